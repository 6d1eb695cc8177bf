"""Oracles of growing batches: the noise scale of the schedule at every epoch, and a state that goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from strategies.backprop import amend
from strategies.batch_growth import BatchGrowth, stretches
from strategies.contract import Clock, Plan, PlanError
from strategies.ema import Ema
from strategies.rate import Cosine, Rate, Steps
from tests.strategies.harness import baseline, distance, train

EXAMPLES = 48_000


def with_rate(rate: Rate, plan: Plan | None = None) -> Plan:
    return (plan or baseline()).map(lambda phase: amend(phase, rate, rate=lambda old: rate))


@pytest.mark.parametrize("largest", [None, 100, 800])
@pytest.mark.parametrize("rate", [
    Rate(0.4, decay=Steps((0.5, 0.75), 0.1)),
    Rate(0.4, warmup=5.0, start=0.1, decay=Steps((0.3, 0.6, 0.8), 0.3)),
])  # fmt: skip
def test_rate_over_batch_is_that_of_the_schedule(rate: Rate, largest: int | None) -> None:
    """eta / B equal at every epoch (the momentum is the same), epochs identical, updates fewer."""
    epochs, batch, begin, updates = 30.0, 64, 0.0, 0.0
    parts = list(stretches(rate, epochs, batch, largest))
    steps = round(epochs * EXAMPLES / batch)
    for part in parts:
        for epoch in np.arange(begin + 1e-6, begin + part.epochs, 0.05):
            before = rate(Clock(round(epoch * EXAMPLES / batch), steps, epoch, batch / EXAMPLES, batch, 0))
            after = part.rate(Clock(0, 1, epoch - begin, batch / EXAMPLES, batch, 0))
            if abs(epoch - begin) > batch / EXAMPLES:
                assert after / part.batch == pytest.approx(before / batch, rel=1e-12)
        begin, updates = begin + part.epochs, updates + part.epochs * EXAMPLES / part.batch
    assert begin == pytest.approx(epochs, rel=1e-15)
    assert updates < steps and max(part.batch for part in parts) <= (largest or np.inf)


@pytest.mark.parametrize("rate", [0.1, 0.3, 1.0])
def test_noisy_quadratic(rate: float) -> None:
    """2000 steps at B = 64, then rate / 10 for 2000 steps or B = 640 for 200: losses within 0.5 %."""
    h = 1 / np.arange(1, 10_001)

    def run(moment: np.ndarray, rate: float, batch: int, steps: int) -> np.ndarray:
        squeeze, fixed = (1 - rate * h) ** 2, rate / (batch * (2 - rate * h))
        return squeeze**steps * (moment - fixed) + fixed

    first = run(np.ones_like(h), rate, 64, 2000)
    decayed, grown = 0.5 * h @ run(first, rate / 10, 64, 2000), 0.5 * h @ run(first, rate, 640, 200)
    assert grown == pytest.approx(decayed, rel=5e-3)
    schedule = Rate(rate, decay=Steps((0.5,), 0.1))
    parts = [(round(s.epochs * 10_000 / s.batch), s.batch, s.rate.peak) for s in stretches(schedule, 25.6, 64)]
    assert parts == [(2000, 64, rate), (200, 640, pytest.approx(rate, rel=1e-15))]


def test_the_state_goes_on(tmp_path: Path) -> None:
    """Stretches of one and the same batch are one phase: momentum and averages know nothing of the cut."""
    plain, cut = (with_rate(Rate(0.1, decay=Steps((0.25, 0.5), 1.0))) for _ in range(2))
    whole = train(Ema(0.5).edit(plain), tmp_path / "whole")
    parts = BatchGrowth().edit(Ema(0.5).edit(cut))
    assert [phase.name for phase in parts.phases] == ["train 1", "train 2", "train 3"]
    assert distance(train(parts, tmp_path / "parts"), whole) == 0


def test_the_state_goes_on_from_phases_kept(tmp_path: Path) -> None:
    plan = BatchGrowth().edit(with_rate(Rate(0.1, decay=Steps((0.5,), 0.5))))
    fresh = train(plan, tmp_path / "fresh")
    train(Plan(plan.phases[:1]), tmp_path / "reused")
    (tmp_path / "reused" / "trial").rename(tmp_path / "first")
    reused = train(plan, tmp_path / "reused")
    assert reused.progress.reused_steps == 6 and distance(fresh, reused) == 0


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"takes the place of a step decay.*Cosine\(\).*`decay: step`"):
        BatchGrowth().edit(with_rate(Rate(0.1, decay=Cosine())))
