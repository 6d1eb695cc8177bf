"""Features that `stage_wise` keeps equal those that it computes, bit for bit or as closely as stated, and costs add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.identity import feature_key
from orchestrator.recipe.workload_schema import Interval
from strategies.contract import PlanError
from strategies.net import Net
from tests.strategies.harness import CLASSES, EXAMPLES, WIDTH, Pair, distance, train
from tests.strategies.parts_of_nets import Indexed, Pictures, convolved, network, plan, record, untimed


@pytest.mark.parametrize("cache", ["off", "exact"])
def test_resumed_in_the_second_part_equals_uninterrupted(cache: str, tmp_path: Path) -> None:
    edited, unbroken = plan(cuts=[1], cache=cache), train(plan(cuts=[1]), tmp_path / "unbroken", Indexed())
    data = Indexed(fail_at=15 * 12)
    with pytest.raises(InterruptedError):
        train(edited, tmp_path / "broken", Failing(data), save_seconds=0)
    assert distance(train(edited, tmp_path / "broken", data, save_seconds=0), unbroken) == 0


def Failing(data: Indexed) -> Indexed:
    """Reading of places fails too: so it does where features take the place of examples."""
    read = data.places

    def places(start: int, stop: int) -> Any:
        if data.fail_at is not None and stop > data.fail_at:
            data.fail_at = None
            raise InterruptedError("the planted fault")
        return read(start, stop)

    data.places = places  # type: ignore[method-assign]
    return data


def test_workers_that_do_not_see_the_folder_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.feature_cache.mirrored", lambda: True)
    with pytest.raises(PlanError, match="needs a folder of studies that all nodes see"):
        train(plan(cuts=[1], cache="exact"), tmp_path, Indexed())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("micro", [64, 5])
def test_kept_features_equal_computed_ones_bit_for_bit(dtype: torch.dtype, micro: int, tmp_path: Path) -> None:
    runs = [
        train(plan(convolved, cuts=[1, 2], cache=cache), tmp_path / cache, Pictures(dtype=dtype), micro_batch=micro)
        for cache in ("off", "exact")
    ]
    assert distance(*runs) == 0
    assert untimed(runs[0]) == untimed(runs[1])
    assert runs[0].rows[-1]["flops"] > runs[1].rows[-1]["flops"]  # of steps: making features is charged in seconds


def test_flops_are_those_of_the_formula(tmp_path: Path) -> None:
    """3 F_s of the part and F_j of each stage before it, save that the first layer of all has no gradient for its input."""
    linear, head, last = 2 * 6 * 8, 2 * 8 * CLASSES, 2 * 8 * 8
    rows = {cache: train(plan(cuts=[1], cache=cache), tmp_path / cache, Indexed()).rows for cache in ("off", "exact")}
    first_part = 144 * (2 * linear + 3 * head)
    assert rows["off"][11]["flops"] == first_part
    second = {"off": 144 * (linear + 2 * last + 3 * head), "exact": 144 * (2 * last + 3 * head)}
    assert {cache: r[-1]["flops"] - first_part for cache, r in rows.items()} == second


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "rendezvous")
    yield pair
    pair.close()


def test_two_workers_each_keep_a_shard(pair: Pair, tmp_path: Path) -> None:
    edited = plan(cuts=[1], cache="exact", patience=2)
    alone, both = train(edited, tmp_path / "one", Indexed()), pair.train(edited, tmp_path / "two", data=Indexed())
    assert distance(alone, both) < 1e-12
    folder = tmp_path / "two" / "phases" / feature_key(edited, 1, {"test": str(tmp_path / "two")})
    assert sorted(p.name for p in folder.iterdir()) == [
        "meta.json", "test-0.npy", "test-1.npy", "train-0.npy", "train-1.npy",
    ]  # fmt: skip


def test_features_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for another trial that trains the next part otherwise; a damaged folder is made again."""
    from orchestrator import feature_cache

    made: list[Path] = []
    make = feature_cache._make
    monkeypatch.setattr(feature_cache, "_make", lambda *args: (made.append(args[-1]), make(*args)))
    rates = [[None, None], [None, 0.05], [None, 0.01]]
    plans = [plan(cuts=[1], cache="exact", rates=r) for r in rates]
    for edited in plans[:2]:
        train(edited, tmp_path, Indexed())
    assert len(made) == 1
    (tmp_path / "trial" / "checkpoints").mkdir(exist_ok=True)
    shard = made[0] / "train-0.npy"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="damaged features are computed anew"):
        train(plans[2], tmp_path, Indexed())
    assert len(made) == 2


@pytest.mark.parametrize("store", ["fp16", "uint8"])
def test_rounded_features_are_as_close_as_their_store_has_it(store: str, tmp_path: Path) -> None:
    from orchestrator.feature_cache import Features

    edited = plan(convolved, cuts=[1], cache=store)
    rounded = train(edited, tmp_path / store, Pictures())
    assert distance(rounded, train(plan(convolved, cuts=[1]), tmp_path / "off", Pictures())) > 1e-9
    folder = tmp_path / store / "phases" / feature_key(edited, 1, {"test": str(tmp_path / store)})
    kept = Features(Pictures(), folder, torch.float64, torch.device("cpu"))
    net = network(edited, 1, (2, 4, 4))
    net.load_state_dict(record(edited, 1, tmp_path / store))
    true = net.eval().stages[0](Pictures().x)
    error = (kept.unaugmented(0, EXAMPLES).x - true).detach().abs()
    low, high = true.flatten(1).aminmax(dim=1)
    bound = (high - low).view(-1, 1, 1, 1) / 510 * (1 + 1e-9) if store == "uint8" else true.abs() * 2**-11 + 2**-25
    assert (error <= bound).all() and error.max() > 0
    assert torch.equal(kept.test(0, 31).x, true[:31])


def test_the_cost_is_that_of_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples through each stage, forward and backward: E epochs of each part, its prefix too unless that is kept; then
    each frozen stage sees each example once. What fills up a chunk is not counted."""
    monkeypatch.setattr("orchestrator.flops.per_example", lambda *args: 0.0)  # has a pass of its own
    n, epochs, tests = EXAMPLES, 2, 31
    ran: Counter[tuple[str, int]] = Counter()
    for cache in ("off", "exact"):
        ran.clear()
        train(
            plan(counted(ran), epochs, cuts=[1, 2], cache=cache),
            tmp_path / cache,
            Indexed(),
            evaluate=Interval(epochs=epochs),
        )
        evaluated = {"off": [3, 2, 1], "exact": [1 + 1, 1 + 1, 1]}[cache]  # times the test set goes through each stage
        seen = [ran["forward", i] - tests * evaluated[i] for i in range(3)]
        prefix = {"off": [2 * epochs * n, epochs * n, 0], "exact": [n + 2, n + 2, 0]}[cache]  # 2: to learn their shape
        assert seen == [epochs * n + p for p in prefix]
        assert [ran["backward", i] for i in range(3)] == [epochs * n] * 3


class Meter(nn.Module):
    """Counts examples that are not all zeros, as those are that fill a chunk."""

    def __init__(self, ran: Counter[tuple[str, int]], index: int):
        super().__init__()
        self.ran, self.index = ran, index

    def forward(self, x: Tensor) -> Tensor:
        self.ran["forward", self.index] += int((x != 0).flatten(1).any(1).sum())
        if x.requires_grad:
            x.register_hook(lambda grad: self._count(len(grad)))
        return x

    def _count(self, n: int) -> None:
        self.ran["backward", self.index] += n


METER: list[Counter[tuple[str, int]]] = []


def metered_net(inputs: tuple[int, ...], classes: int) -> Net:
    """A stage is a linear layer without bias and a meter behind it, so that examples of zeros stay zeros."""
    sizes = [WIDTH, 8, 8, 8]
    stages = [nn.Sequential(nn.Linear(a, b, bias=False), nn.Tanh(), Meter(METER[-1], i))
              for i, (a, b) in enumerate(pairwise(sizes))]  # fmt: skip
    return Net(stages, head=nn.Linear(8, classes))


def counted(ran: Counter[tuple[str, int]]) -> Any:
    METER.append(ran)
    return metered_net
