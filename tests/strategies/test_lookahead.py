"""Oracles of Lookahead, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.engines import make_worker
from orchestrator.recipe.workload_schema import Interval
from strategies.contract import Plan, PlanError, State
from strategies.ema import Ema
from strategies.lookahead import Lookahead, SlowWeights
from tests.strategies.by_hand import Vectors
from tests.strategies.cases import normalised_net, with_batch_norm
from tests.strategies.harness import Blobs, Pair, baseline, distance, train
from tests.strategies.test_backprop import clock


def path(update: SlowWeights, steps: int = 6) -> tuple[list[float], list[float]]:
    """Fast weights start at 0 and grow by 1 in each of `steps` steps: fast and slow ones after each of them."""
    net = Vectors([0.0], [0.0])
    state: State = update.init(net, make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")))
    fast, slow = [], []
    for step in range(steps):
        with torch.no_grad():
            net.w += 1
        update.after(state, clock(step, steps))
        fast.append(net.w.item())
        slow.append(update.weights(state)["w"].item())
    return fast, slow


def test_slow_weights_go_half_of_the_way() -> None:
    """0 -> 2: to 1, then 1 -> 3: to 2; fast weights go on from there."""
    assert path(SlowWeights(2, 0.5, 0.0)) == ([1, 1, 2, 2, 3, 3], [0, 1, 1, 2, 2, 3])


def test_all_of_the_way_is_no_lookahead() -> None:
    assert path(SlowWeights(3, 1.0, 2.0)) == ([1, 2, 3, 4, 5, 6], [0, 0, 3, 3, 3, 6])


def test_the_part_shrinks() -> None:
    """1 - 0.5 p at p = 1/2 and 1: 3/4 of 2 is 1.5, then half of the way from 1.5 to 3.5 is 2.5."""
    assert path(SlowWeights(2, 0.5, 1.0), steps=4) == ([1, 1.5, 2.5, 2.5], [0, 1.5, 1.5, 2.5])
    published = SlowWeights(5, 1 - 0.95**5, 3.0)
    assert [published.part(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 1 - 0.95**5 / 8, 1 - 0.95**5], abs=1e-15)


def test_running_statistics_follow_the_weights() -> None:
    net = normalised_net((6,), 3).double()
    update = SlowWeights(1, 0.25, 0.0)
    state = update.init(net, make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")))
    torch.nn.init.constant_(net.stages[0][1].running_mean, 8.0)
    update.after(state, clock(0))
    assert net.stages[0][1].running_mean.tolist() == [2.0] * 8
    assert update.weights(state)["stages.0.1.running_mean"].tolist() == [2.0] * 8


def test_slow_weights_are_evaluated_and_kept(tmp_path: Path) -> None:
    """With one move, after step 10 of 12 and all of the way, training is the plain one, and what stood there is kept."""
    each = {"evaluate": Interval(steps=1)}
    plain, late = train(baseline(), tmp_path / "plain", **each), train(ten(), tmp_path / "late", **each)
    assert [row["train_loss"] for row in plain.rows] == [row["train_loss"] for row in late.rows]
    losses = [row["test_loss"] for row in plain.rows]
    assert [row["test_loss"] for row in late.rows[9:]] == [losses[9]] * 3 != losses[9:]
    assert late.weights.keys() == plain.weights.keys() and distance(late, plain) > 1e-6


def ten() -> Plan:
    return Lookahead(every=10, alpha=1.0).edit(baseline())


def normed() -> Plan:
    return Lookahead(every=3).edit(with_batch_norm(baseline()))


def test_two_workers_resume_between_moves(tmp_path: Path) -> None:
    """Rank 0's checkpoint holds the slow running statistics of both."""
    pair = Pair(tmp_path / "rendezvous")
    try:
        unbroken = pair.train(normed(), tmp_path / "unbroken")
        with pytest.raises(AssertionError, match="planted fault"):
            pair.train(normed(), tmp_path / "broken", data=Blobs(fail_at=60), save_seconds=0)
    finally:
        pair.close()
    again = Pair(tmp_path / "again")
    try:
        assert distance(again.train(normed(), tmp_path / "broken", save_seconds=0), unbroken) == 0
    finally:
        again.close()


def test_one_average_of_weights_alone() -> None:
    with pytest.raises(PlanError, match=r"Average\(half_life=1.0, .* and SlowWeights\(.* both average weights"):
        Lookahead().edit(Ema().edit(baseline()))
