"""Oracles of parameter averaging: what it equals, what a round joins, and NG-SGD on workers of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cluster.engines import make_worker
from orchestrator.recipe.workload_schema import Interval
from strategies.backprop import Backprop
from strategies.contract import Batch, Clock, ModelSpec, Plan, PlanError, Predict, Worker, mix
from strategies.ema import Ema
from strategies.net import Net
from strategies.ng_sgd import NgSgd
from strategies.optimizers import Sgd
from strategies.parameter_averaging import ParameterAveraging, best_of
from strategies.post_local_sgd import PostLocalSgd
from strategies.rate import Rate
from tests.strategies.cases import with_adamw
from tests.strategies.harness import CLASSES, WIDTH, Blobs, Pair, baseline, distance, tiny_net, train
from tests.workers import run_workers

EXACT = 1e-12
ALWAYS: dict[str, Any] = {"save_seconds": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "rendezvous")
    yield pair
    pair.close()


def with_sgd(plan: Plan, momentum: float) -> Plan:
    change = {"optimizer": Sgd(momentum=momentum), "rate": Rate(0.1)}
    return plan.map(lambda phase: replace(phase, learner=replace(phase.learner, **change)))  # type: ignore[type-var]


@pytest.mark.parametrize("batch", [12, 11])  # shares of 6 and 6, or of 5 and 6
def test_rounds_of_one_step_are_synchronous_sgd(batch: int, pair: Pair, tmp_path: Path) -> None:
    """At the same rate, which is each worker's: rate x W on summed gradients of W shards, averaged."""
    usual = with_sgd(baseline(batch=batch), 0.0)
    rounds = ParameterAveraging(steps=1, first="average").edit(usual)
    assert distance(pair.train(rounds, tmp_path / "rounds"), train(usual, tmp_path / "usual")) < EXACT


def by_hand(period: int, momentum: str, first: str, steps: int = 12) -> dict[str, torch.Tensor]:
    """Two workers with SGD written out, on the halves of each batch of 12."""
    torch.manual_seed(mix(0, "init", 0))
    nets = [tiny_net((WIDTH,), CLASSES).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    buffers: list[dict[str, Any]] = [{name: 0.0 for name, _ in nets[0].named_parameters()} for _ in range(2)]
    losses = [0.0, 0.0]
    for step in range(steps):
        for rank, net in enumerate(nets):
            batch = Blobs().train(step * 12 + rank * 6, step * 12 + rank * 6 + 6)
            loss = cross_entropy(net(batch.x), batch.y)
            losses[rank] += loss.item()
            names, weights = zip(*net.named_parameters(), strict=True)
            for name, w, g in zip(names, weights, torch.autograd.grad(loss, weights), strict=True):
                buffers[rank][name] = 0.9 * buffers[rank][name] + g
                w.data -= 0.1 * buffers[rank][name]
        if (step + 1) % period == 0 or step + 1 == steps:
            best = losses.index(min(losses)) if first == "best" and step < period else None
            mean = [(a + b) / 2 for a, b in zip(*(list(n.parameters()) for n in nets), strict=True)]
            for net in nets:
                for w, m, b in zip(net.parameters(), mean, list(nets[best or 0].parameters()), strict=True):
                    w.data = (m if best is None else b).detach().clone()
            for name in buffers[0]:
                both = [buffer[name] for buffer in buffers]
                shared = both[best] if best is not None else (both[0] + both[1]) / 2
                for rank in range(2):
                    buffers[rank][name] = {"average": shared, "reset": 0.0, "own": both[rank]}[momentum]
    return nets[0].state_dict()


@pytest.mark.parametrize("first", ["average", "best"])
@pytest.mark.parametrize("momentum", ["average", "reset", "own"])
def test_rounds_by_hand(momentum: Any, first: Any, pair: Pair, tmp_path: Path) -> None:
    """After steps 5, 10 and the last; rows between them change nothing."""
    options = ParameterAveraging(steps=5, momentum=momentum, first=first)
    found = pair.train(options.edit(with_sgd(baseline(), 0.9)), tmp_path, log_steps=2).weights
    wanted = by_hand(5, momentum, first)
    assert max(float((found[k] - wanted[k]).abs().max()) for k in wanted) < EXACT


@pytest.mark.parametrize(("examples", "steps"), [(6, 1), (24, 4), (25, 5)])
def test_a_round_in_examples_of_each_worker(examples: int, steps: int, pair: Pair, tmp_path: Path) -> None:
    """Of a batch of 12, a worker has 6."""
    by_examples = pair.train(ParameterAveraging(examples=examples).edit(baseline()), tmp_path / "examples")
    by_steps = pair.train(ParameterAveraging(steps=steps).edit(baseline()), tmp_path / "steps")
    assert distance(by_examples, by_steps) == 0


STEPS, WORKERS = 3, 2
DRAWS = list(itertools.product(range(2), repeat=STEPS * WORKERS))  # all ways to draw one of two examples, step by step
EXAMPLES = torch.tensor([[1.0, -0.5, 2.0], [0.3, 2.0, -1.0]], dtype=torch.float64)  # two inputs and the output


class Drawn(Blobs):
    """Position p of the stream holds, for each way to draw, its p-th example: (ways, 3)."""

    def train(self, start: int, stop: int) -> Batch:
        way = torch.tensor(DRAWS)[:, torch.arange(start, stop)].T  # (n, ways)
        return Batch(EXAMPLES[way], torch.zeros(stop - start, dtype=torch.int64), torch.arange(start, stop))

    def test(self, start: int, stop: int) -> Batch:
        return self.train(0, 1)


class LinearModels(Net):
    """A linear model for each way to draw, all from the same weights: inputs and output -> residuals."""

    def __init__(self) -> None:
        super().__init__([])
        self.w = nn.Parameter(torch.tensor([0.5, 0.7], dtype=torch.float64).repeat(len(DRAWS), 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x[..., :2] * self.w).sum(-1) - x[..., 2]


def linear_models(inputs: tuple[int, ...], classes: int) -> Net:
    return LinearModels()


@dataclass(frozen=True)
class PowerLoss:
    """Of each model by itself: the mean over examples of |residual|^power / power."""

    power: int

    def __call__(self, predict: Predict, batch: Batch, clock: Clock) -> Tensor:
        return predict(batch.x).pow(self.power).sum(1).mean() / self.power


def test_averaging_commutes_with_sgd_in_expectation_for_a_quadratic(pair: Pair, tmp_path: Path) -> None:
    """The mean over all ways to draw is gradient descent, exactly: rounds of two steps and of one. Not so for another loss."""
    off = {}
    for power in (2, 4):
        learner = Backprop(optimizer=Sgd(momentum=0.0), rate=Rate(0.02), objective=PowerLoss(power))
        phase = replace(
            baseline(STEPS * WORKERS / 48, WORKERS).phases[0], learner=learner, model=ModelSpec(linear_models)
        )
        rounds = ParameterAveraging(steps=2, first="average").edit(Plan((phase,)))
        w = pair.train(rounds, tmp_path / str(power), data=Drawn(), evaluate=Interval(steps=100)).weights["w"]
        assert w.std(0).min() > 0.01
        descent = torch.tensor([0.5, 0.7], dtype=torch.float64)
        for _ in range(STEPS):
            x, y = EXAMPLES[:, :2], EXAMPLES[:, 2]
            descent = descent - 0.02 * ((x @ descent - y) ** (power - 1)) @ x / 2
        off[power] = (w.mean(0) - descent).abs().max()
    assert off[2] < EXACT and off[4] > 1e-3


@pytest.mark.parametrize("base", [lambda plan: NgSgd().edit(plan), with_adamw], ids=["ng_sgd", "adamw"])
def test_resumed_within_a_round_equals_uninterrupted(base: Any, pair: Pair, tmp_path: Path) -> None:
    """Each worker finds its own weights, memory and factors again, and the losses of the first round."""
    plan = ParameterAveraging(steps=5).edit(base(baseline()))
    unbroken = pair.train(plan, tmp_path / "unbroken")
    for killed_at in (3, 7, 11):
        folder = tmp_path / f"broken{killed_at}"
        with pytest.raises(AssertionError, match="the planted fault"):
            pair.train(plan, folder, data=Blobs(fail_at=killed_at * 12), **ALWAYS)
        assert list((folder / "trial" / "checkpoints").glob("step_*"))
        assert distance(pair.train(plan, folder, **ALWAYS), unbroken) == 0


def test_ng_sgd_learns_in_rounds(pair: Pair, tmp_path: Path) -> None:
    rows = pair.train(ParameterAveraging(steps=4).edit(NgSgd().edit(baseline(epochs=10))), tmp_path).rows
    assert rows[-1]["test_loss"] < 0.5 * rows[0]["train_loss"]


def learner(options: ParameterAveraging | None) -> Backprop:
    plan = NgSgd(history_samples=50).edit(with_sgd(baseline(), 0.9))
    plan = options.edit(plan) if options else plan
    return plan.phases[0].learner  # type: ignore[return-value]


def stepped(worker: Worker, options: ParameterAveraging | None, data: int, steps: int) -> dict[str, torch.Tensor]:
    """Weights and factors after steps of 6 examples a worker, from the half `data` of each batch of 12."""
    torch.manual_seed(3)
    net, own = tiny_net((WIDTH,), CLASSES).double(), learner(options)
    state = own.init(net, worker)
    for step in range(steps):
        batch = Blobs().train(step * 12 + data * 6, step * 12 + data * 6 + 6)
        own.step(state, [batch], Clock(step, 8, step / 8, 0.25, 6 * worker.size, 0))
    index = [type(update).__name__ for update in own.updates].index("Precondition")
    factors = state.saved["updates"][index].saved["factors"]
    dense = {
        name: (f["q"].T * f["d"]) @ f["q"] + f["rho"] * torch.eye(f["q"].shape[1], dtype=f["d"].dtype)
        for name, f in factors.items()
    }
    return {**{name: p.detach().clone() for name, p in net.named_parameters()}, **dense}


ROUNDS = ParameterAveraging(steps=4, first="average")
LOSSES = [[3.0, 2.0], [2.0, 2.0], [float("nan"), 9.0]]


def on_two(worker: Worker) -> dict[str, Any]:
    best = [best_of(torch.tensor([losses[worker.rank], 4.0], dtype=torch.float64), worker) for losses in LOSSES]
    solo = make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))
    return {
        "within": stepped(worker, ROUNDS, worker.rank, 3),
        "alone": stepped(solo, None, worker.rank, 3),
        "joined": stepped(worker, ROUNDS, worker.rank, 4),
        "apart": stepped(worker, replace(ROUNDS, merge_factors=False), worker.rank, 4),
        "best": stepped(worker, replace(ROUNDS, first="best"), worker.rank, 4),
        "last": stepped(solo, None, worker.rank, 4),
        "twins": stepped(worker, ROUNDS, 0, 8),
        "twin": stepped(solo, None, 0, 8),
        "best of losses": best,
    }


def gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_each_worker_has_factors_of_its_own_which_rounds_merge() -> None:
    one, other = run_workers(on_two, 2)
    assert one["best of losses"] == other["best of losses"] == [1, 0, 1]  # a loss that is not finite is not the best
    for own in (one, other):  # within a round, a worker is one that trains alone
        assert gap(own["within"], own["alone"]) < EXACT
    assert gap(one["within"], other["within"]) > 1e-3
    assert gap(one["joined"], other["joined"]) == 0
    factors = [name for name in one["apart"] if name.endswith((".in", ".out"))]
    for name in factors:
        assert (one["apart"][name] - one["last"][name]).abs().max() < EXACT
        mean = (one["last"][name] + other["last"][name]) / 2
        assert torch.allclose(one["joined"][name].trace(), mean.trace(), rtol=1e-12)
    assert len(factors) == 4 and gap(one["apart"], other["apart"]) > 1e-3
    assert gap(one["best"], other["best"]) == 0
    assert min(gap(one["best"], own["last"]) for own in (one, other)) < EXACT
    for own in (one, other):  # with the same data, workers are one worker, however often they join
        assert gap(own["twins"], own["twin"]) < 1e-10


def test_the_seams_that_clash_are_refused() -> None:
    for one, other, words in (
        (ParameterAveraging(), PostLocalSgd(), "leave one out"),
        (PostLocalSgd(), ParameterAveraging(), "leave one out"),
        (ParameterAveraging(), Ema(), "weights of their own"),
        (Ema(), ParameterAveraging(), "weights of their own"),
    ):
        with pytest.raises(PlanError, match=words):
            other.edit(one.edit(baseline()))
