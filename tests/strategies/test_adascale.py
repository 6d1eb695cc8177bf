"""Oracles of AdaScale: its gain in closed form, the published estimator, and the schedule that it goes through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.adascale import Adascale, gain
from strategies.batch_growth import BatchGrowth
from strategies.contract import Clock, PlanError
from strategies.lars import Lars
from strategies.parts.gradient_noise import estimate
from strategies.rate import Polynomial, Rate
from tests.strategies.cases import with_adamw, with_step_decay
from tests.strategies.harness import EXAMPLES, baseline, train


@pytest.mark.parametrize(("per", "scale", "expected"), [(8, 16, 12.978072135936388), (16, 8, 6.589766996770314)])
def test_gain_by_hand(per: int, scale: int, expected: float) -> None:
    """B_simple = 507.356; as the law of the critical batch size has it, (1 + B / b) / (1 + B / (S b))."""
    assert gain(507.356, 1.0, per, scale) == pytest.approx(expected, rel=1e-12)
    assert gain(507.356, 1.0, per, scale) == pytest.approx(
        (1 + 507.356 / per) / (1 + 507.356 / (scale * per)), rel=1e-12
    )


def test_limits() -> None:
    assert gain(0.0, 4.0, 8, 16) == 1.0  # no noise: a larger batch brings nothing
    assert gain(4.0, 0.0, 8, 16) == 16.0  # nothing but noise: it brings all
    assert gain(4.0, -1.0, 8, 16) == 16.0  # an estimate of the signal may be negative
    assert gain(0.0, 0.0, 8, 16) == 1.0


positive = st.floats(1e-6, 1e6)


@given(positive, positive, st.integers(1, 1000), st.floats(1.0, 1000.0))
def test_gain_lies_between_one_and_the_scale(trace: float, signal: float, per: int, scale: float) -> None:
    assert 1 - 1e-12 <= gain(trace, signal, per, scale) <= scale * (1 + 1e-12)


@given(st.lists(positive, min_size=2, max_size=8), st.integers(1, 9), st.floats(0, 1))
def test_the_published_estimator(squares: list[float], per: int, share: float) -> None:
    """sigma^2 = (mean |g_i|^2 - |g|^2) S / (c - 1), mu^2 = |g|^2 - sigma^2 / S for c groups of a batch of S x per."""
    groups, size = len(squares), 12
    mean = sum(squares) / groups
    both, scale = share * mean, size * groups / per  # |g|^2 is the mean of |g_i|^2 at most
    noise = estimate(squares, [size] * groups, both)
    sigma = (mean - both) * scale / (groups - 1)
    mu = both - sigma / scale
    assert noise.trace / per == pytest.approx(sigma, rel=1e-9, abs=1e-9 * mean)
    assert noise.signal == pytest.approx(mu, rel=1e-9, abs=1e-9 * mean)


def test_the_schedule_is_gone_through_once(tmp_path: Path) -> None:
    """Batch 12 = 4 x 3: the gains add up to the 48 iterations of 3 epochs at batch 3, and the rates are the schedule's."""
    plan = Adascale(3).edit(baseline())
    rows = train(plan, tmp_path, micro_batch=6).rows
    gains = [row["train_gain"] for row in rows]
    iterations = 3 * EXAMPLES / 3
    assert all(1 <= g <= 4 for g in gains) and max(gains) > 1.01
    assert sum(gains) >= iterations - 1e-6 > sum(gains[:-1])
    assert iterations / 4 <= len(rows) < iterations
    assert rows[-1]["test_loss"]  # the last step is evaluated, wherever it comes


def test_rates_follow_the_gain(tmp_path: Path) -> None:
    """Those of the small batch's schedule, warm-up included, at the iteration reached."""
    schedule = Rate(0.1, warmup=0.5, decay=Polynomial())
    plan = Adascale(3).edit(baseline())
    learner = plan.phases[0].learner
    plan = plan.map(lambda phase: replace(phase, learner=replace(learner, rate=schedule)))  # type: ignore[type-var]
    rows = train(plan, tmp_path, micro_batch=6).rows
    done = 0.0
    for row in rows:
        small = Clock(step=int(done), steps=48, epoch=int(done) / 16, epochs_per_step=1 / 16, batch=3, seed=0)
        assert row["rate"] == pytest.approx(row["train_gain"] * schedule(small), rel=1e-12)
        done += row["train_gain"]


def test_averages_are_those_of_the_estimates(tmp_path: Path) -> None:
    """Two parts a step: each estimate counts 0.002 anew, and the ratio is that of corrected averages."""
    rows = train(Adascale(3).edit(baseline()), tmp_path, micro_batch=6).rows
    trace = signal = weight = 0.0
    for row in rows:
        trace = 0.998 * trace + 0.002 * row["train_noise_trace"]
        signal = 0.998 * signal + 0.002 * row["train_noise_signal"]
        weight = 0.998 * weight + 0.002
        assert row["train_gain"] == pytest.approx(gain(trace / weight, signal / weight, 3, 4), rel=1e-12)


def test_other_optimizers_than_sgd_are_refused() -> None:
    """In whichever order, and also at the batch size at which AdaScale itself changes nothing."""
    for per in (3, 12):
        with pytest.raises(PlanError, match=r"derived for SGD, but the optimizer is AdamW\(.*write `optimizer: sgd`"):
            Adascale(per).edit(with_adamw(baseline()))
    with pytest.raises(PlanError, match="derived for SGD, but the optimizer is LayerwiseSgd"):
        Adascale(3).edit(Lars().edit(baseline()))
    with pytest.raises(PlanError, match="derived for SGD, but the optimizer is LayerwiseSgd"):
        Lars().edit(Adascale(3).edit(baseline()))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="per is 24, but the batch is 12"):
        Adascale(24).edit(baseline())
    with pytest.raises(PlanError, match="add workers, or halve"):
        train(Adascale(3).edit(baseline()), tmp_path)
    growth = BatchGrowth().edit(with_step_decay(baseline()))
    with pytest.raises(PlanError, match="several phases"):
        Adascale(3).edit(growth)
    with pytest.raises(PlanError, match="leave one of the two out"):
        BatchGrowth().edit(Adascale(3).edit(with_step_decay(baseline())))
