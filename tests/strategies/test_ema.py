"""Oracles of the moving average on networks with batch norm; the average itself: test_backprop.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strategies.contract import Plan, PlanError
from strategies.ema import Ema
from tests.strategies.cases import with_batch_norm
from tests.strategies.harness import Blobs, Trained, baseline, distance, train


def normalised(half_life: float = 0.5, examples: int | None = 1024) -> Plan:
    return Ema(half_life, examples).edit(with_batch_norm(baseline()))


def losses(trained: Trained, name: str) -> list[float]:
    return [row[name] for row in trained.rows if name in row]


@pytest.mark.parametrize("examples", [20, 1024])
def test_statistics_are_those_of_the_averaged_weights(examples: int, tmp_path: Path) -> None:
    """What is kept holds mean and variance of its own activations, over 20 training examples or over all 48."""
    kept = train(normalised(examples=examples), tmp_path).weights
    x = Blobs().train(0, min(examples, 48)).x
    seen = x @ kept["stages.0.0.weight"].T + kept["stages.0.0.bias"]
    assert torch.allclose(kept["stages.0.1.running_mean"], seen.mean(0), rtol=0, atol=1e-12)
    assert torch.allclose(kept["stages.0.1.running_var"], seen.var(0, correction=0), rtol=0, atol=1e-12)


def test_training_is_not_disturbed_and_its_own_statistics_can_be_kept(tmp_path: Path) -> None:
    usual = train(with_batch_norm(baseline()), tmp_path / "usual")
    anew, left = train(normalised(), tmp_path / "anew"), train(normalised(examples=None), tmp_path / "left")
    assert losses(usual, "train_loss") == losses(anew, "train_loss") == losses(left, "train_loss")
    for name, value in left.weights.items():
        ours = usual if "running" in name or "tracked" in name else anew
        assert torch.equal(value, ours.weights[name])
    assert not torch.equal(anew.weights["stages.0.1.running_var"], left.weights["stages.0.1.running_var"])
    assert losses(anew, "test_loss") != losses(left, "test_loss")


def test_without_averaging_nothing_is_estimated(tmp_path: Path) -> None:
    usual = train(with_batch_norm(baseline()), tmp_path / "usual")
    assert distance(train(normalised(half_life=0.0), tmp_path / "none"), usual) == 0


def test_resumed_with_batch_norm(tmp_path: Path) -> None:
    unbroken = train(normalised(), tmp_path / "unbroken")
    data = Blobs(fail_at=9 * 12)
    with pytest.raises(InterruptedError):
        train(normalised(), tmp_path / "broken", data, save_seconds=0)
    assert distance(train(normalised(), tmp_path / "broken", data, save_seconds=0), unbroken) == 0


def test_one_example_has_no_variance() -> None:
    with pytest.raises(PlanError, match="Ema: examples is 1, expected >= 2"):
        Ema(examples=1)
