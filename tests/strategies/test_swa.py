"""Oracles of stochastic weight averaging."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch

from cluster.engines import make_worker
from strategies.adascale import Adascale
from strategies.contract import Plan, PlanError, State
from strategies.ema import Ema
from strategies.swa import LateAverage, Swa
from tests.strategies.by_hand import Vectors
from tests.strategies.cases import with_batch_norm
from tests.strategies.harness import Blobs, baseline, distance, train
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


def test_each_phase_averages_its_own_weights() -> None:
    """The state goes on from a phase of w = 1 to one of w = 2."""
    net = Vectors()
    update, state = start(net, 0.5)
    for value in (1.0, 2.0):
        torch.nn.init.constant_(net.w, value)
        for step in range(10):
            update.after(state, clock(step))
            assert (update.weights(state) is None) == (step < 5)
    weights = update.weights(state)
    assert weights and weights["w"].eq(2).all()


def test_the_average_is_evaluated_and_kept(tmp_path: Path) -> None:
    """Averaging from 8 of 12 steps on: up to there nothing changes, and what is kept is not what was trained last."""
    plain, late = train(baseline(), tmp_path / "plain"), train(Swa(8 / 12).edit(baseline()), tmp_path / "late")
    losses = [[row.get("test_loss") for row in t.rows] for t in (plain, late)]
    assert losses[0][:8] == losses[1][:8] and losses[0][11] != losses[1][11]
    assert [row["train_loss"] for row in plain.rows] == [row["train_loss"] for row in late.rows]


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"Average\(half_life=1.0, .* and LateAverage\(.* both average weights"):
        Swa().edit(Ema().edit(baseline()))
    for first, then in permutations((Swa(), Adascale(per=2))):
        with pytest.raises(PlanError, match="adascale ends it before: leave one of the two out"):
            then.edit(first.edit(baseline()))


def normalised(start: float = 0.5, examples: int = 1024) -> Plan:
    return Swa(start, examples).edit(with_batch_norm(baseline()))


@pytest.mark.parametrize("examples", [20, 1024])
def test_batch_norm_is_estimated_over_training_examples(examples: int, tmp_path: Path) -> None:
    """What is kept holds, in batch norm, mean and variance of the averaged weights' activations; 48 examples are all."""
    kept = train(normalised(examples=examples), tmp_path).weights
    x = Blobs().train(0, min(examples, 48)).x
    seen = x @ kept["stages.0.0.weight"].T + kept["stages.0.0.bias"]
    assert torch.allclose(kept["stages.0.1.running_mean"], seen.mean(0), rtol=0, atol=1e-12)
    assert torch.allclose(kept["stages.0.1.running_var"], seen.var(0, correction=0), rtol=0, atol=1e-12)


def test_batch_norm_does_not_disturb_training(tmp_path: Path) -> None:
    """The network's own statistics, which are evaluated until averaging starts, are left as training makes them."""
    usual = train(with_batch_norm(baseline()), tmp_path / "usual")
    late = train(normalised(8 / 12), tmp_path / "late")
    assert [row["train_loss"] for row in usual.rows] == [row["train_loss"] for row in late.rows]
    assert [row.get("test_loss") for row in usual.rows[:8]] == [row.get("test_loss") for row in late.rows[:8]]
    assert distance(train(normalised(1.0), tmp_path / "never"), usual) == 0


def test_resumed_with_batch_norm(tmp_path: Path) -> None:
    unbroken = train(normalised(), tmp_path / "unbroken")
    data = Blobs(fail_at=9 * 12)
    with pytest.raises(InterruptedError):
        train(normalised(), tmp_path / "broken", data, save_seconds=0)
    assert distance(train(normalised(), tmp_path / "broken", data, save_seconds=0), unbroken) == 0
