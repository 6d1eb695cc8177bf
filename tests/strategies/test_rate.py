"""Schedules: end points, warm-up per iteration, and the algebra of the scaling rules."""

from __future__ import annotations

import itertools
from math import inf, isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.contract import Clock, PlanError
from strategies.rate import Constant, Cosine, Polynomial, Rate, Steps, adam_sde, scaled


def clock(step: int, steps: int = 100, per_step: float = 0.1) -> Clock:
    return Clock(step, steps, step * per_step, per_step, 32, 0)


def test_constant() -> None:
    assert [Rate(0.3)(clock(t)) for t in (0, 50, 99)] == [0.3, 0.3, 0.3]


def test_warmup_rises_per_iteration_to_the_peak() -> None:
    """Two epochs of 10 steps: the rate rises by equal amounts and the peak is reached when the warm-up ends."""
    rates = [Rate(1.0, warmup=2.0)(clock(t)) for t in range(22)]
    assert rates[0] > 0 and rates[20] == rates[21] == 1.0
    rises = [b - a for a, b in itertools.pairwise(rates[:21])]
    assert all(isclose(rise, 1 / 21, abs_tol=1e-12) for rise in rises)


def test_warmup_from_the_unscaled_rate() -> None:
    """Goyal et al. 2017: from eta to kappa eta; with kappa = 8 the start is an eighth of the peak."""
    rate = Rate(0.8, warmup=2.0, start=1 / 8)
    assert 0.1 < rate(clock(0)) < 0.1 + 0.8 / 20
    assert rate(clock(20)) == 0.8


@pytest.mark.parametrize("decay", [Cosine(), Polynomial(), Polynomial(2.0), Polynomial(2.0, 0.1)])
@pytest.mark.parametrize("warmup", [0.0, 2.0])
def test_decays_end_where_they_should(decay: Cosine | Polynomial, warmup: float) -> None:
    rate = Rate(2.0, warmup=warmup, decay=decay)
    first = int(warmup * 10)
    assert isclose(rate(clock(first)), 2.0)
    assert isclose(rate(clock(100)), 2.0 * getattr(decay, "end", 0.0), abs_tol=1e-12)
    rates = [rate(clock(t)) for t in range(first, 101)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_and_polynomial_half_way() -> None:
    assert isclose(Rate(1.0, decay=Cosine())(clock(50)), 0.5)
    assert isclose(Rate(1.0, decay=Polynomial(2.0))(clock(50)), 0.25)
    assert isclose(Rate(1.0, decay=Polynomial(1.0, 0.2))(clock(50)), 0.6)


def test_steps() -> None:
    rate = Rate(1.0, decay=Steps((0.5, 0.75), 0.1))
    assert [round(rate(clock(t)), 6) for t in (0, 49, 50, 74, 75, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


rules = st.sampled_from(["none", "linear", "sqrt", "adam_sde", "noise_scale"])
batches = st.integers(1, 10**6)


@given(rules, batches, batches, batches)
def test_scaling_twice_is_scaling_once(rule: str, per: int, middle: int, batch: int) -> None:
    noise = 507.4 if rule == "noise_scale" else None
    twice = scaled(scaled(0.1, middle, per, rule, noise), batch, middle, rule, noise)
    assert isclose(twice, scaled(0.1, batch, per, rule, noise), rel_tol=1e-12)


@given(rules, batches)
def test_the_stated_batch_leaves_the_peak(rule: str, batch: int) -> None:
    assert scaled(0.1, batch, batch, rule, 507.4 if rule == "noise_scale" else None) == pytest.approx(0.1, rel=1e-15)


def test_rules_by_hand() -> None:
    assert scaled(0.1, 8192, 256, "linear") == pytest.approx(3.2, abs=1e-15)
    assert scaled(0.1, 1024, 256, "sqrt") == pytest.approx(0.2, abs=1e-15)
    assert scaled(0.1, 1024, 256, "none") == 0.1
    with pytest.raises(PlanError, match="unknown scaling rule 'cubic'"):
        scaled(0.1, 1, 1, "cubic")


def test_noise_scale_rule() -> None:
    """eta = eta_max / (1 + B_noise / B): linear far below the noise scale, level far above, half of the most at it."""
    most = 0.1 * (1 + 1000 / 10)
    assert scaled(0.1, 1000, 10, "noise_scale", 1000) == pytest.approx(most / 2, rel=1e-14)
    assert scaled(0.1, 20, 10, "noise_scale", 1e9) == pytest.approx(0.2, rel=1e-7)
    assert scaled(0.1, 10**9, 10, "noise_scale", 1000) == pytest.approx(most, rel=1e-5)
    for rule, noise in (("noise_scale", None), ("sqrt", 1000.0)):
        with pytest.raises(PlanError, match="go together"):
            scaled(0.1, 20, 10, rule, noise)


def test_adam_sde_by_hand() -> None:
    """k = 8 from (0.9, 0.999): rate x 2.8284, beta1 0.2, beta2 0.992, eps x 0.3536 (Malladi et al. 2022)."""
    assert scaled(1.0, 256, 32, "adam_sde") == pytest.approx(8**0.5, rel=1e-15)
    assert adam_sde(0.9, 0.999, 1e-8, 256, 32) == pytest.approx((0.2, 0.992, 1e-8 / 8**0.5), rel=1e-12)
    with pytest.raises(PlanError, match=r"beta1 0\.9 at batch 32 .* stay below batch 320"):
        adam_sde(0.9, 0.999, 1e-8, 320, 32)


@given(st.integers(64, 320), st.integers(64, 320), st.integers(64, 320))
def test_adam_sde_twice_is_once(per: int, middle: int, batch: int) -> None:
    once = adam_sde(0.9, 0.999, 1e-8, batch, per)
    assert adam_sde(*adam_sde(0.9, 0.999, 1e-8, middle, per), batch, middle) == pytest.approx(once, rel=1e-12)
    assert adam_sde(0.9, 0.999, 1e-8, per, per) == (0.9, 0.999, 1e-8)


def test_a_run_that_is_all_warmup_stays_finite() -> None:
    rate = Rate(1.0, warmup=10.0, decay=Cosine())
    assert all(0 <= rate(clock(t)) < inf for t in range(101))


def test_constant_is_one() -> None:
    assert Constant()(0.7) == 1.0
