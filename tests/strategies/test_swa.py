"""Oracles of stochastic weight averaging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.engines import make_worker
from strategies.contract import PlanError, State
from strategies.ema import Ema
from strategies.swa import LateAverage, Swa
from tests.strategies.by_hand import Vectors
from tests.strategies.cases import with_batch_norm
from tests.strategies.harness import baseline, train
from tests.strategies.test_backprop import clock


def start(net: Vectors, share: float) -> tuple[LateAverage, State]:
    update = LateAverage(share)
    return update, update.init(net, make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")))


def test_copies_average_to_the_copy() -> None:
    net = Vectors([0.1, 0.7])
    update, state = start(net, 0.0)
    for step in range(10):
        update.after(state, clock(step))
    weights = update.weights(state)
    assert weights and torch.equal(weights["w"], net.w) and torch.equal(weights["b"], net.b)


@pytest.mark.parametrize(("share", "first"), [(0.0, 1), (0.5, 6), (0.75, 8), (0.9, 10)])
def test_average_of_the_weights_after_late_steps(share: float, first: int) -> None:
    """Step k of 10 sets w = k: the average is that of first .. 10."""
    net = Vectors()
    update, state = start(net, share)
    for step in range(10):
        torch.nn.init.constant_(net.w, step + 1)
        update.after(state, clock(step))
        assert (update.weights(state) is None) == (step + 1 < first)
    weights = update.weights(state)
    assert weights and weights["w"].tolist()[0] == pytest.approx([(first + 10) / 2] * 2, abs=1e-14)


def test_the_average_is_evaluated_and_kept(tmp_path: Path) -> None:
    """Averaging from 8 of 12 steps on: up to there nothing changes, and what is kept is not what was trained last."""
    plain, late = train(baseline(), tmp_path / "plain"), train(Swa(8 / 12).edit(baseline()), tmp_path / "late")
    losses = [[row.get("test_loss") for row in t.rows] for t in (plain, late)]
    assert losses[0][:8] == losses[1][:8] and losses[0][11] != losses[1][11]
    assert [row["train_loss"] for row in plain.rows] == [row["train_loss"] for row in late.rows]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"Average\(half_life=1.0\) and LateAverage\(.* both average weights"):
        Swa().edit(Ema().edit(baseline()))
    with pytest.raises(PlanError, match=r"running statistics of 1 batch norms \(stages.0.1"):
        train(Swa().edit(with_batch_norm(baseline())), tmp_path)
