"""Stage-wise training against its oracles: what is frozen stays, what is kept equals what is computed, costs add up."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from orchestrator.identity import canonical, feature_key, phase_key
from orchestrator.phases import PhaseStore
from orchestrator.recipe.workload_schema import Interval
from orchestrator.workloads import order
from strategies.backprop import CrossEntropy
from strategies.batch_growth import BatchGrowth
from strategies.contract import Batch, Clock, ModelSpec, Plan, PlanError
from strategies.lars import Lars
from strategies.net import Net
from strategies.parts.staged_net import StagedNet
from strategies.stage_wise import Patience, Reconstruction, StageWise, first, listed
from tests.strategies.cases import staged_net, with_step_decay
from tests.strategies.harness import CLASSES, EXAMPLES, WIDTH, Blobs, Pair, Trained, baseline, distance, train

IMAGES = (1, 4, 4)
CLOCK = Clock(0, 1, 0.0, 1.0, 12, 0)


@dataclasses.dataclass
class Indexed(Blobs):
    """Blobs whose features can be kept."""

    @property
    def train_y(self) -> Tensor:
        return self.y

    @property
    def test_y(self) -> Tensor:
        return self.y

    def places(self, start: int, stop: int) -> Any:
        return order.indices(self.seed, start, stop, EXAMPLES)

    def unaugmented(self, start: int, stop: int) -> Batch:
        return Batch(self.x[start:stop], self.y[start:stop], torch.arange(start, stop))


class Pictures(Indexed):
    """The same as 4x4 images that lie in memory as (n, h, w, c), as those of a data set do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wide = torch.linspace(-1, 1, WIDTH * 32, dtype=torch.float64).sin().view(WIDTH, 32).to(self.dtype)
        self.x = (self.x.flatten(1) @ wide).view(-1, 4, 4, 2).permute(0, 3, 1, 2)
        self.inputs = (2, 4, 4)


def convolved(inputs: tuple[int, ...], classes: int) -> Net:
    """Three stages with batch norm, as images, then as vectors."""
    one = nn.Sequential(nn.Conv2d(inputs[0], 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
    two = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
    three = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.Tanh())
    return Net([one, two, three], head=nn.Linear(8, classes))


def plan(build: Any = staged_net, passes: float = 3, **options: Any) -> Plan:
    whole = baseline(passes).map(lambda phase: dataclasses.replace(phase, model=ModelSpec(build)))
    return StageWise(**options).edit(whole) if options else whole


def network(edited: Plan, index: int, inputs: tuple[int, ...] = (WIDTH,)) -> StagedNet:
    torch.manual_seed(index)
    net = edited.phases[index].model(inputs, CLASSES)
    assert isinstance(net, StagedNet)
    return net.double()


def record(edited: Plan, index: int, directory: Path) -> dict[str, Tensor]:
    kept = PhaseStore(directory / "phases").get(phase_key(edited, index, {"test": str(directory)}))
    assert kept
    return kept.weights


# -------------------------------------------------------------------------------------------------------------- frozen


def test_what_is_frozen_stays_as_it_was(tmp_path: Path) -> None:
    """Weights and running statistics, through momentum, weight decay and batch norm."""
    edited = plan(convolved, cuts=[1, 2])
    train(edited, tmp_path, Pictures())
    one, two, three = (record(edited, i, tmp_path) for i in range(3))
    stage = [name for name in one if name.startswith("stages.0.")]
    assert len(stage) == 7 and all(torch.equal(one[name], three[name]) for name in stage)
    assert all(torch.equal(two[name], three[name]) for name in two if name.startswith("stages.1."))
    assert not torch.equal(one["head.0.weight"], two["head.0.weight"][:, :5])
    assert {name.split(".")[1] for name in one if name.startswith("stages")} == {"0"}
    assert three.keys() == plan(convolved).phases[0].model(Pictures().inputs, CLASSES).state_dict().keys()


@pytest.mark.parametrize("growth_first", [False, True])
def test_what_is_frozen_stays_so_in_each_phase_of_a_part(growth_first: bool, tmp_path: Path) -> None:
    """With batches that grow, each part has several phases, of which the later ones take all weights over."""
    whole = with_step_decay(plan(convolved))
    methods = [StageWise(cuts=[1], cache="exact"), BatchGrowth()]
    for method in reversed(methods) if growth_first else methods:
        whole = method.edit(whole)
    assert len(whole.phases) == 4
    train(whole, tmp_path, Pictures())
    first, last = record(whole, 1, tmp_path), record(whole, 3, tmp_path)
    assert all(torch.equal(first[name], last[name]) for name in first if name.startswith("stages.0."))
    assert not torch.equal(record(whole, 2, tmp_path)["stages.1.0.weight"], last["stages.1.0.weight"])
    contexts = {"test": str(tmp_path)}
    assert feature_key(whole, 2, contexts) == feature_key(whole, 3, contexts)


def test_no_gradient_reaches_what_is_frozen() -> None:
    edited = plan(convolved, cuts=[1, 2])
    net = network(edited, 1, (2, 4, 4))
    net.take(network(edited, 0, (2, 4, 4)).state_dict())
    net.train()
    before = {name: value.clone() for name, value in net.stages[0].state_dict().items()}
    cross_entropy(net(Pictures().x), Pictures().y).backward()
    assert all(p.grad is None for p in net.stages[0].parameters())
    assert all(p.grad is not None for module in (net.stages[1], net.head) for p in module.parameters())
    assert not net.stages[0].training and net.stages[1].training
    assert all(torch.equal(value, before[name]) for name, value in net.stages[0].state_dict().items())


def test_the_last_part_predicts_with_the_networks_own_head(tmp_path: Path) -> None:
    edited = plan(cuts=[1])
    trained = train(edited, tmp_path)
    whole = staged_net((WIDTH,), CLASSES).double()
    whole.load_state_dict(trained.weights)
    loss = cross_entropy(whole(Blobs().x[:31]), Blobs().y[:31])
    assert trained.rows[-1]["test_loss"] == pytest.approx(loss.item(), abs=1e-12)


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


def steep_net(inputs: tuple[int, ...], classes: int) -> Net:
    net = staged_net(inputs, classes)
    assert isinstance(net.head, nn.Linear)
    net.head.weight.data *= 100
    return net


def test_a_part_that_starts_at_a_higher_loss_has_not_diverged(tmp_path: Path) -> None:
    trained = train(plan(steep_net, cuts=[1], rates=[None, 1e-6]), tmp_path)
    losses = [row["train_loss"] for row in trained.rows]
    assert min(losses[12:]) > 3 * losses[0] and trained.progress.status == "done"


# --------------------------------------------------------------------------------------------------------------- cache


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


def untimed(trained: Trained) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "second" not in k and k != "flops"} for row in trained.rows]


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


# ------------------------------------------------------------------------------------------------------------- options


def test_heads_have_the_parameters_of_their_kind() -> None:
    def head(kind: str, build: Any = convolved, inputs: tuple[int, ...] = (2, 4, 4)) -> int:
        net = network(plan(build, cuts=[1], head=kind), 0, inputs)
        return sum(p.numel() for module in (net.pool, net.head) for p in module.parameters())

    assert head("linear") == 80 * CLASSES + CLASSES
    assert head("pooled") == 5 * CLASSES + CLASSES
    assert head("network") == 5 * 5 * 9 + 5 + 5 * CLASSES + CLASSES
    assert head("pooled", staged_net, (WIDTH,)) == head("linear", staged_net, (WIDTH,)) == 8 * CLASSES + CLASSES
    assert head("network", staged_net, (WIDTH,)) == 8 * 8 + 8 + 8 * CLASSES + CLASSES


def test_each_part_has_its_own_epochs_rate_and_decay() -> None:
    one, two = plan(cuts=[1], epochs=[1, 2.5], rates=[0.3, None], weight_decay=[None, 0.5]).phases
    base = plan().phases[0].learner
    assert (one.epochs, two.epochs) == (1, 2.5)
    assert (one.learner.rate.peak, two.learner.rate) == (0.3, base.rate)  # type: ignore[attr-defined]
    assert one.learner.rate.warmup == base.rate.warmup  # type: ignore[attr-defined]
    assert one.learner.optimizer == base.optimizer  # type: ignore[attr-defined]
    assert two.learner.optimizer.weight_decay == 0.5  # type: ignore[attr-defined]


def test_the_ensemble_is_the_weighted_mean_of_all_heads(tmp_path: Path) -> None:
    edited = plan(cuts=[1], ensemble=2.0)
    trained = train(edited, tmp_path)
    one, x, y = record(edited, 0, tmp_path), Blobs().x[:31], Blobs().y[:31]
    features = (x @ one["stages.0.1.weight"].T + one["stages.0.1.bias"]).tanh()
    early = features @ one["head.0.weight"].T + one["head.0.bias"]
    w = trained.weights
    late = (features @ w["stages.1.0.weight"].T + w["stages.1.0.bias"]).tanh() @ w["head.weight"].T + w["head.bias"]
    loss = cross_entropy((early + 2 * late) / 3, y)
    assert trained.rows[-1]["test_loss"] == pytest.approx(loss.item(), abs=1e-12)
    alone = train(plan(cuts=[1]), tmp_path / "alone")
    assert trained.rows[-1]["train_loss"] == alone.rows[-1]["train_loss"]  # heads are trained each for itself


@pytest.mark.parametrize(("build", "inputs"), [(staged_net, (WIDTH,)), (convolved, (2, 4, 4))])
def test_an_unsupervised_part_learns_to_reconstruct(build: Any, inputs: tuple[int, ...], tmp_path: Path) -> None:
    """The labels move its head alone, and the loss is the sum of both."""
    edited = plan(build, cuts=[1], unsupervised=1)
    net = network(edited, 0, inputs).train()
    data = Blobs() if inputs == (WIDTH,) else Pictures()
    out = net(data.x)
    labels = torch.autograd.grad(
        cross_entropy(out[:, :-1], data.y), net.parameters(), allow_unused=True, retain_graph=True
    )
    moved = {name for (name, _), g in zip(net.named_parameters(), labels, strict=True) if g is not None and g.any()}
    assert moved == {name for name, _ in net.named_parameters() if name.startswith("head.")}
    error = (net.decoder(net.stages[0](data.x)) - data.x).square().mean()
    assert out[:, -1].mean().item() == pytest.approx(error.item(), abs=1e-12)
    total = Reconstruction(CrossEntropy())(net, Batch(data.x, data.y, torch.arange(EXAMPLES)), CLOCK)
    assert total.item() == pytest.approx((cross_entropy(out[:, :-1], data.y) + error).item(), abs=1e-12)
    rows = train(edited, tmp_path, data).rows
    assert rows[11]["train_loss"] < rows[0]["train_loss"] and "test_accuracy" in rows[11]


def test_patience_ends_a_part_early(tmp_path: Path) -> None:
    """A rate of zero lowers no loss: the first evaluation is the best, and the step after the third is the last."""
    edited = plan(cuts=[1], epochs=[10, 1], rates=[0.0, None], patience=2, watched=24)
    trained = train(edited, tmp_path)
    steps = [row["step"] for row in trained.rows if row["phase"] == 0]
    assert steps[-1] == 3 * 4 + 1 and trained.progress.steps == 13 + 4
    assert Patience(2, 24) in edited.phases[0].learner.updates  # type: ignore[attr-defined]


def test_patience_watches_the_loss_of_the_first_examples(tmp_path: Path) -> None:
    from cluster.engines import make_worker

    worker = make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))
    net, watch = staged_net((WIDTH,), CLASSES).double(), Patience(1, 7)
    state = watch.init(net, worker)
    watch.refresh(state, Blobs().first)
    loss = cross_entropy(net(Blobs().x[:7]), Blobs().y[:7]).item()
    assert state.saved["best"] == pytest.approx(loss, abs=1e-12) and not watch.ended(state)
    watch.refresh(state, Blobs().first)
    assert watch.ended(state)


# ----------------------------------------------------------------------------------------------------- shared beginnings


def listing(inputs: tuple[int, ...], classes: int, stages: list[int]) -> Net:
    """A network that lists its stages: widths of linear layers."""
    sizes = [WIDTH, *stages]
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(sizes, stages, strict=False)]
    return Net(layers, head=nn.Linear(sizes[-1], classes))


def of(*stages: int, **options: Any) -> Plan:
    spec = ModelSpec(listing, (("stages", list(stages)),))
    whole = baseline().map(lambda phase: dataclasses.replace(phase, model=spec))
    return StageWise(**{"head": "own"} | options).edit(whole)


def test_networks_that_begin_alike_are_alike_up_to_there() -> None:
    short, long, other = of(8, 8), of(8, 8, 5), of(8, 7)
    assert canonical(short.phases) == canonical(long.phases[:2])
    assert canonical(short.phases[0]) == canonical(other.phases[0])
    assert canonical(of(8).phases) == canonical(long.phases[:1])
    assert listed(ModelSpec(listing, (("stages", [8]),))) == 1 and listed(ModelSpec(staged_net)) is None
    assert first(ModelSpec(staged_net), 1) == ModelSpec(staged_net)


def test_a_shared_beginning_equals_an_unshared_one(tmp_path: Path) -> None:
    """Seeds and the order of examples do not depend on what follows: the same weights and rows, bit for bit."""
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    train(of(8, 8), shared)
    for path in (shared / "trial").iterdir():
        path.unlink()
    long = train(of(8, 8, 5), shared)
    assert long.progress.reused_steps == 24
    again = train(of(8, 8, 5), alone)
    assert again.progress.reused_steps == 0
    assert distance(long, again) == 0 and untimed(long) == untimed(again)


# ---------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "does not list its stages: state where to cut"),
        ({"cuts": [2, 1]}, "expected rising numbers"),
        ({"cuts": [0]}, "expected rising numbers"),
        ({"cuts": [1], "rates": [0.1]}, "rates is .* expected 2 numbers"),
        ({"cuts": [1], "weight_decay": [-1, None]}, "expected 2 numbers"),
        ({"cuts": [1], "epochs": [0, 1]}, "expected > 0"),
        ({"cuts": [1], "unsupervised": 2}, "expected less than its 2 parts"),
        ({"cuts": [1], "head": "own"}, "needs a model that lists its stages"),
        ({"cuts": [1], "ensemble": 1.0, "cache": "exact"}, "leave out cache or ensemble"),
    ],
)
def test_what_cannot_be_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        StageWise(**options).edit(plan())


def test_networks_that_cannot_be_cut_are_told() -> None:
    from tests.strategies.harness import tiny_net

    for build, cuts, message in (
        (staged_net, [2], "the network has 2 stages"),
        (tiny_net, [], "forward pass of its own"),
    ):
        with pytest.raises(PlanError, match=message):
            network(plan(build, cuts=cuts), 0)


def test_a_plan_of_several_networks_is_told() -> None:
    one, other = plan().phases[0], plan(convolved).phases[0]
    with pytest.raises(PlanError, match="cuts one network"):
        StageWise(cuts=[1]).edit(Plan((one, other)))


def test_rates_and_decay_of_another_optimizer_are_told() -> None:
    with pytest.raises(PlanError, match="put stage_wise before"):
        StageWise(cuts=[1], weight_decay=[0.1, 0.1]).edit(Lars().edit(plan()))
