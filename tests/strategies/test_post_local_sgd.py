"""Oracles of post-local SGD: what it equals, when workers talk, and that nothing is lost where replicas differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engines import make_worker
from strategies.contract import Clock, Plan, PlanError, Worker, mix
from strategies.ema import Ema
from strategies.ghost_batch_norm import GhostBatchNorm
from strategies.gradient_clipping import GradientClipping
from strategies.net import Net
from strategies.optimizers import Sgd
from strategies.parts.ghost_layer import ghosts, split
from strategies.parts.local_steps import LocalSteps, OpenModel
from strategies.post_local_sgd import PostLocalSgd
from strategies.rate import Rate
from strategies.swa import Swa
from tests.strategies.cases import normalised_net, with_adamw, with_batch_norm
from tests.strategies.harness import CLASSES, WIDTH, Blobs, Pair, baseline, distance, tiny_net, train
from tests.workers import run_workers

EXACT = 1e-12
ALWAYS: dict[str, Any] = {"save_seconds": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "rendezvous")
    yield pair
    pair.close()


def plain(plan: Plan) -> Plan:
    """The same with neither momentum nor decay."""
    change = {"optimizer": Sgd(momentum=0)}
    return plan.map(lambda phase: replace(phase, learner=replace(phase.learner, **change)))  # type: ignore[type-var]


@pytest.mark.parametrize("batch", [12, 11])  # shares of 6 and 6, or of 5 and 6
@pytest.mark.parametrize("base", [plain, lambda plan: plan], ids=["plain", "momentum"])
def test_a_period_of_one_is_synchronous_sgd(base: Any, batch: int, pair: Pair, tmp_path: Path) -> None:
    """With momentum too: a mean of buffers moves as the buffer of the mean gradient does."""
    usual = base(baseline(batch=batch))
    local = PostLocalSgd(start=0.0, period=1).edit(usual)
    assert distance(pair.train(local, tmp_path / "local"), train(usual, tmp_path / "usual")) < EXACT


def test_before_the_start_nothing_changes(pair: Pair, tmp_path: Path) -> None:
    usual = train(baseline(), tmp_path / "usual")
    late = pair.train(PostLocalSgd(start=0.5, period=4).edit(baseline()), tmp_path / "late")
    losses = [[row["test_loss"] for row in t.rows if "test_loss" in row] for t in (usual, late)]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=EXACT) and losses[0][2] != pytest.approx(
        losses[1][2], abs=1e-9
    )
    never = pair.train(PostLocalSgd(start=1.0, period=4).edit(baseline()), tmp_path / "never")
    assert distance(never, usual) < EXACT


def by_hand(period: int, steps: int = 12, make: Callable[[], Net] = lambda: tiny_net((WIDTH,), CLASSES)) -> list[Net]:
    """Two workers with SGD written out, on the halves of each batch of 12, momentum their own."""
    torch.manual_seed(mix(0, "init", 0))
    nets = [make().double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    buffers: list[dict[str, torch.Tensor]] = [{}, {}]
    for step in range(steps):
        for rank, net in enumerate(nets):
            batch = Blobs().train(step * 12 + rank * 6, step * 12 + rank * 6 + 6)
            loss = torch.nn.functional.cross_entropy(net(batch.x), batch.y)
            names, weights = zip(*net.named_parameters(), strict=True)
            for layer in ghosts(net):
                if not layer.in_order:
                    layer.absorb(layer.sums)
            for name, w, g in zip(names, weights, torch.autograd.grad(loss, weights), strict=True):
                buffers[rank][name] = 0.9 * buffers[rank].get(name, 0.0) + g
                w.data -= 0.1 * buffers[rank][name]
        if (step + 1) % period == 0 or step + 1 == steps:
            for a, b in zip(*(net.parameters() for net in nets), strict=True):
                a.data = b.data = (a.data + b.data) / 2
                b.data = a.data.clone()
    return nets


@pytest.mark.parametrize("period", [1, 5, 6, 20])
@pytest.mark.parametrize("log_steps", [1, 12])
def test_two_workers_by_hand(period: int, log_steps: int, pair: Pair, tmp_path: Path) -> None:
    """Averages after steps 5, 10 and the last, say, however often rows are written between them."""
    usual = baseline().map(
        lambda p: replace(p, learner=replace(p.learner, optimizer=Sgd(momentum=0.9), rate=Rate(0.1)))  # type: ignore[type-var]
    )
    local = pair.train(PostLocalSgd(start=0.0, period=period).edit(usual), tmp_path, log_steps=log_steps)
    wanted = by_hand(period)[0].state_dict()
    assert max(float((local.weights[k] - wanted[k]).abs().max()) for k in wanted) < EXACT


ghostly = pytest.mark.parametrize("statistics", ["mean", "in_order"])


def with_ghosts(plan: Plan, statistics: Any) -> Plan:
    """Batch norms over parts of 3 of the 6 examples that each worker has of a batch."""
    return GhostBatchNorm(3, statistics).edit(with_batch_norm(plan))


@ghostly
def test_ghost_batch_norm_with_a_period_of_one_is_that_of_synchronous_sgd(
    statistics: str, pair: Pair, tmp_path: Path
) -> None:
    """Running statistics too, whichever of the two comes first in the recipe."""
    usual = pair.train(with_ghosts(baseline(), statistics), tmp_path / "usual")
    always = PostLocalSgd(start=0.0, period=1)
    for name, plan in (
        ("after", always.edit(with_ghosts(baseline(), statistics))),
        ("before", with_ghosts(always.edit(baseline()), statistics)),
    ):
        assert distance(pair.train(plan, tmp_path / name), usual) < EXACT


@ghostly
@pytest.mark.parametrize("log_steps", [1, 12])
def test_ghost_batch_norm_of_workers_that_step_alone_by_hand(
    statistics: str, log_steps: int, pair: Pair, tmp_path: Path
) -> None:
    """Each worker normalises parts of its own examples with its own weights; running statistics are the mean of both."""
    usual = baseline().map(
        lambda p: replace(p, learner=replace(p.learner, optimizer=Sgd(momentum=0.9), rate=Rate(0.1)))  # type: ignore[type-var]
    )
    plan = PostLocalSgd(start=0.0, period=5).edit(with_ghosts(usual, statistics))
    found = pair.train(plan, tmp_path, log_steps=log_steps).weights
    nets = by_hand(5, make=lambda: split(normalised_net((WIDTH,), CLASSES), 3, statistics == "in_order"))
    one, other = (net.state_dict() for net in nets)
    assert not torch.equal(one["stages.0.1.running_mean"], other["stages.0.1.running_mean"])
    for name, value in found.items():
        assert torch.allclose(value.double(), (one[name].double() + other[name].double()) / 2, rtol=0, atol=EXACT), name


@pytest.mark.parametrize("base", [lambda plan: plan, with_adamw], ids=["sgd", "adamw"])
def test_resumed_between_averages_equals_uninterrupted(base: Any, pair: Pair, tmp_path: Path) -> None:
    plan = PostLocalSgd(start=0.25, period=5).edit(base(baseline()))
    unbroken = pair.train(plan, tmp_path / "unbroken")
    for killed_at in (1, 6, 10):
        folder = tmp_path / f"broken{killed_at}"
        with pytest.raises(AssertionError, match="the planted fault"):
            pair.train(plan, folder, data=Blobs(fail_at=killed_at * 12), **ALWAYS)
        assert list((folder / "trial" / "checkpoints").glob("step_*")) or killed_at == 1
        resumed = pair.train(plan, folder, **ALWAYS)
        assert distance(resumed, unbroken) == 0


def counted(worker: Worker, twins: bool) -> tuple[list[int], list[Any], dict[str, Any]]:
    """(calls of sum_ and weights after each of 12 steps, final weights) with averages every 4 steps from step 4 on."""
    torch.manual_seed(3)
    net = tiny_net((WIDTH,), CLASSES).double()
    learner = LocalSteps(optimizer=Sgd(), rate=Rate(0.1), start=1 / 3, period=4, updates=(OpenModel(),))
    state = learner.init(net, worker)
    calls: list[int] = []
    weights: list[Any] = []
    real = worker.sum_

    def counting(t: torch.Tensor) -> torch.Tensor:
        calls[-1] += 1
        return real(t)

    worker.sum_ = counting  # type: ignore[method-assign]
    for step in range(12):
        calls.append(0)
        first = step * 6 if twins else step * 12 + worker.rank * 6
        learner.step(state, [Blobs().train(first, first + 6)], Clock(step, 12, step / 4, 0.25, 6 * worker.size, 0))
        weights.append(torch.nn.utils.parameters_to_vector(net.parameters()).tolist())
    return calls, weights, net.state_dict()


def test_workers_talk_at_averages_only_and_then_agree() -> None:
    (calls, mine, _), (_, other, _) = run_workers(counted, 2, False)
    assert calls == [1] * 4 + [0, 0, 0, 1] * 2
    assert [a == b for a, b in zip(mine, other, strict=True)] == [True] * 4 + [False, False, False, True] * 2


def test_workers_with_the_same_data_are_one_worker() -> None:
    alone = counted(make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")), True)[2]
    for _, _, weights in run_workers(counted, 2, True):
        assert max(float((weights[k] - alone[k]).abs().max()) for k in alone) < EXACT


def test_what_follows_the_common_weights_is_refused() -> None:
    for other in (Ema(), Swa()):
        for plan in (
            lambda o=other: PostLocalSgd().edit(o.edit(baseline())),
            lambda o=other: o.edit(PostLocalSgd().edit(baseline())),
        ):
            with pytest.raises(PlanError, match="weights of their own, but"):
                plan()
    assert len(PostLocalSgd().edit(GradientClipping().edit(baseline())).phases[0].learner.updates) == 2  # type: ignore[attr-defined]
