"""Oracles of ghost batch norm: parts in one process are what workers with batch norms of their own are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.engines import make_worker
from orchestrator.micro_batch import largest
from strategies.contract import Batch, Plan, PlanError
from strategies.ghost_batch_norm import GhostBatchNorm, RunningMeans
from strategies.net import Net
from strategies.parts.ghost_layer import split
from tests.strategies.cases import with_batch_norm
from tests.strategies.harness import Pair, Trained, baseline, train
from tests.strategies.test_backprop import clock


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "rendezvous")
    yield pair
    pair.close()


def plan(size: int | None = None, statistics: str = "mean") -> Plan:
    plain = with_batch_norm(baseline())
    return GhostBatchNorm(size, statistics).edit(plain) if size else plain  # type: ignore[arg-type]


def test_a_scale_that_is_not_learnt_stays_so() -> None:
    norm = nn.BatchNorm1d(3)
    norm.weight.requires_grad_(False)
    (ghost,) = split(Net([norm]), 2, True).stages
    assert [p.requires_grad for p in ghost.parameters()] == [False, True]


def differ(a: Trained, b: Trained, statistics: bool) -> float:
    keys = [k for k in a.weights if ("running" in k or "tracked" in k) == statistics]
    return max(float((a.weights[k].double() - b.weights[k].double()).abs().max()) for k in keys)


def test_parts_in_one_process_equal_workers_with_their_own_batch_norm(pair: Pair, tmp_path: Path) -> None:
    """Two workers with 6 examples each; their running statistics are averaged after each step, as the mean over parts is."""
    workers = pair.train(plan(), tmp_path / "workers")
    parts = train(plan(6), tmp_path / "parts")
    assert differ(workers, parts, statistics=False) < 1e-12
    assert differ(workers, parts, statistics=True) < 1e-12
    whole = train(plan(), tmp_path / "whole")
    assert differ(workers, whole, statistics=False) > 1e-2


def test_the_statistics_option_changes_running_statistics_only(tmp_path: Path) -> None:
    mean, in_order = train(plan(3), tmp_path / "mean"), train(plan(3, "in_order"), tmp_path / "in_order")
    assert differ(mean, in_order, statistics=False) == 0
    assert differ(mean, in_order, statistics=True) > 1e-2


def net() -> Net:
    return Net([nn.BatchNorm1d(2)])


def parted(size: int, in_order: bool) -> Net:
    return split(net(), size, in_order).double()


X = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 5.0], [8.0, 5.0]], dtype=torch.float64)


def test_forward_by_hand() -> None:
    """Each pair of examples is normalised by itself: a pair (m - d, m + d) becomes -+ d / sqrt(d^2 + eps)."""
    out = parted(2, True)(X)
    near, far = 1 / (1 + 1e-5) ** 0.5, 3 / (9 + 1e-5) ** 0.5
    assert out[:, 0].tolist() == pytest.approx([-near, near, -far, far], abs=1e-12)
    assert out[:, 1].tolist() == [0, 0, 0, 0]


def test_running_statistics_by_hand() -> None:
    """Means 2 and 5, unbiased variances 2 and 18, momentum 0.1, from mean 0 and variance 1."""
    in_order = parted(2, True)
    in_order(X)
    layer = in_order.stages[0]
    assert layer.running_mean[0].item() == pytest.approx(0.9 * 0.2 + 0.5, abs=1e-14)
    assert layer.running_var[0].item() == pytest.approx(0.9 * (0.9 + 0.2) + 1.8, abs=1e-14)
    assert layer.num_batches_tracked == 2

    mean = parted(2, False)
    update = RunningMeans()
    state = update.init(mean, worker())  # type: ignore[arg-type]
    mean(X[:2])
    mean(X[2:])
    update.before(state, clock())
    layer = mean.stages[0]
    assert layer.running_mean[0].item() == pytest.approx(0.1 * 3.5, abs=1e-14)
    assert layer.running_var[0].item() == pytest.approx(0.9 + 0.1 * 10, abs=1e-14)
    assert layer.num_batches_tracked == 1


def worker() -> object:
    return make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_part_is_batch_norm(in_order: bool, momentum: float | None) -> None:
    plain, parts = net().double(), parted(4, in_order)
    plain.stages[0].momentum = parts.stages[0].momentum = momentum
    for _ in range(3):
        assert torch.equal(plain(X), parts(X))
        if not in_order:
            parts.stages[0].absorb(parts.stages[0].sums)
    assert torch.allclose(plain.stages[0].running_var, parts.stages[0].running_var, atol=1e-14, rtol=0)
    plain.eval(), parts.eval()
    assert torch.allclose(plain(X), parts(X), atol=1e-14, rtol=0)


def test_layers_without_running_statistics() -> None:
    bare = Net([nn.BatchNorm1d(2, track_running_stats=False)])
    layers = split(bare, 2, False).double()
    assert torch.equal(layers(X), parted(2, True)(X))


def test_the_search_for_the_micro_batch_leaves_nothing_behind() -> None:
    parts = parted(2, False)
    largest(parts, lambda n: Batch(X[:n].requires_grad_(), torch.zeros(n), torch.arange(n)), 4, worker())  # type: ignore[arg-type]
    RunningMeans().init(parts, worker())  # type: ignore[arg-type]
    assert parts.stages[0].sums.tolist() == [0] * 5


def test_parameters_and_buffers_keep_their_names_and_values() -> None:
    old = Net([nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())])
    nn.init.zeros_(old.stages[0][1].weight)
    before = {name: value.clone() for name, value in old.state_dict().items()}
    after = split(old, 4, True).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_refused_without_batch_norm(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the network has none"):
        train(GhostBatchNorm(4).edit(baseline()), tmp_path)
    with pytest.raises(PlanError, match="GhostBatchNorm: size is 1, expected >= 2"):
        GhostBatchNorm(1)


def test_edits_are_surgery_and_an_update() -> None:
    phase = dataclasses.replace(plan(8).phases[0])
    assert len(phase.surgery) == 1 and phase.learner.updates == (RunningMeans(),)  # type: ignore[attr-defined]
    assert plan(8, "in_order").phases[0].learner.updates == ()  # type: ignore[attr-defined]
