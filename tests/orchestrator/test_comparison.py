"""Comparison statistics against values by hand, by enumeration, by scipy's tests, and by the coverage of their intervals."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import integrate, stats

from orchestrator.comparison import budget, paired, profiles
from orchestrator.comparison.noise import Series, along, ratio, whole

INF = math.inf

# ------------------------------------------------------------------------------------------------------------ noise scale


def series(trace, signal, weight=None) -> Series:
    weight = np.ones(len(trace)) if weight is None else np.asarray(weight, dtype=float)
    return Series(np.asarray(trace, dtype=float), np.asarray(signal, dtype=float), weight, weight.cumsum())


def autoregressive(rng: np.random.Generator, rows: int, rho: float) -> np.ndarray:
    """Of unit variance, from its stationary distribution."""
    values = rng.normal(size=rows)
    for i in range(1, rows):
        values[i] = rho * values[i - 1] + math.sqrt(1 - rho**2) * values[i]
    return values


def test_the_scale_is_a_ratio_of_averages_weighted_by_examples():
    assert ratio([series([10, 30], [1, -0.5], weight=[1, 3])]).value == pytest.approx(INF)
    assert ratio([series([10, 30], [1, 3], weight=[1, 3])]).value == pytest.approx(100 / 10)
    two = [series([10, 20], [1, 1]), series([60], [1])]
    assert ratio(two).value == pytest.approx(90 / 3) and ratio(two).rows == 3


def test_a_ratio_of_averages_is_right_where_an_average_of_ratios_is_not():
    """Two parts of 8 examples, B_simple 507: the signal of one step is negative in a third of all cases."""
    rng, true = np.random.default_rng(0), 2029.426 / 4
    trace = 2029.426 * rng.gamma(500, 1 / 500, size=20_000)
    signal = 4 + 8.5 * rng.normal(size=20_000)
    found = ratio([series(trace, signal)])
    assert found.low < true < found.high and found.value == pytest.approx(true, rel=0.06)
    assert abs(np.mean(trace / signal) / true - 1) > 0.5


def test_the_interval_ends_where_a_t_test_would_reject():
    """Rows that swing to and fro are their own blocks; then this is Fieller's interval as in textbooks."""
    rng = np.random.default_rng(13)
    swing = np.tile([1.0, -1.0], 15)
    made = series(50 + 8 * swing + rng.normal(size=30), 1 + 0.3 * swing[::-1] + 0.1 * rng.normal(size=30))
    found = ratio([made])
    assert found.block == 1
    for end in (found.low, found.high):
        assert stats.ttest_1samp(made.trace - end * made.signal, 0).pvalue == pytest.approx(0.05, rel=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_intervals_cover_the_scale_of_correlated_rows(rho):
    """200 series of 200 rows; intervals that take rows as independent cover too seldom."""
    rng, covered, naive = np.random.default_rng(1), 0, 0
    for _ in range(200):
        made = series(50 + 10 * autoregressive(rng, 200, rho), 1 + autoregressive(rng, 200, rho))
        found = ratio([made])
        covered += found.low <= 50 <= found.high
        off = made.trace - 50 * made.signal
        naive += abs(off.mean()) < 1.96 * off.std(ddof=1) / math.sqrt(200)
    assert 180 <= covered <= 198
    assert (naive < 165) == (rho > 0)


def test_blocks_grow_with_correlation():
    rng = np.random.default_rng(2)
    blocks = [ratio([series(np.ones(400), 1 + 0.5 * autoregressive(rng, 400, rho))]).block for rho in (0, 0.5, 0.9)]
    assert blocks[0] <= 3 < blocks[1] < blocks[2] <= 80
    rule = (math.sqrt(6) * 0.5 / 0.75) ** (2 / 3) * 400 ** (1 / 3)
    assert blocks[1] == pytest.approx(rule, rel=0.4)


def test_where_the_signal_may_be_zero_there_is_no_upper_end():
    rng = np.random.default_rng(3)
    unclear = ratio([series(np.full(30, 50.0), 0.1 + rng.normal(size=30))])
    assert unclear.high == INF and 0 < unclear.low < INF
    below = ratio([series(np.full(30, 50.0), -1 + 0.01 * rng.normal(size=30))])
    assert (below.value, below.low, below.high) == (INF, INF, INF)


def test_few_rows_have_no_interval():
    found = ratio([series([10] * 7, [1] * 7)])
    assert (found.value, found.low, found.high) == (10, 0, INF)
    with pytest.raises(ValueError, match="at least one row"):
        ratio([series([], [])])


def test_differences_between_trials_widen_the_interval():
    rng = np.random.default_rng(4)
    trials = [series(np.full(50, level), 1 + 0.1 * rng.normal(size=50)) for level in (40.0, 50.0, 60.0)]
    alike = [series(np.full(50, 50.0), t.signal) for t in trials]
    assert np.ptp(np.log([ratio(trials).low, ratio(trials).high])) > 3 * np.ptp(
        np.log([ratio(alike).low, ratio(alike).high])
    )


def test_stretches_are_equal_in_examples_and_hold_rows_enough():
    made = series(np.linspace(10, 100, 64), np.ones(64), weight=np.full(64, 32.0))
    found = along([made])
    assert [(s.first, s.last) for s in found] == [(0, 512), (512, 1024), (1024, 1536), (1536, 2048)]
    assert [s.scale.rows for s in found] == [16] * 4
    assert [s.scale.value for s in found] == pytest.approx([made.trace[i : i + 16].mean() for i in (0, 16, 32, 48)])
    assert len(along([made] * 10)) == 12 and len(along([series([1, 2], [1, 1])])) == 1 and along([]) == []


def test_a_trend_along_the_run_is_no_scatter_of_its_average():
    """The scale grows tenfold; the interval of the whole run is about as narrow as those of its stretches."""
    rng = np.random.default_rng(11)
    made = series(np.geomspace(10, 100, 240) * rng.normal(1, 0.05, 240), rng.normal(1, 0.2, 240))
    run, plain = whole([made]), ratio([made])
    assert run.value == pytest.approx(plain.value) and run.low < run.value < run.high
    assert run.high / run.low - 1 < 0.1 < 1 < plain.high / plain.low - 1


def test_the_interval_of_a_whole_run_covers():
    rng, covered = np.random.default_rng(12), 0
    for _ in range(200):
        made = series(np.linspace(20, 80, 192) + autoregressive(rng, 192, 0.3), 1 + 0.5 * autoregressive(rng, 192, 0.3))
        found = whole([made])
        covered += found.low <= 50 <= found.high
    assert 176 <= covered <= 198


# ----------------------------------------------------------------------------------------------------------------- paired


def test_known_differences_get_student_t():
    values = [0.8, 1.1, 0.4, 0.9, 1.3]
    found = paired.difference(values, values)
    expected = stats.ttest_1samp(values, 0.0)
    ends = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), rel=1e-12)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    assert (found.least, found.most, found.n, found.above, found.test) == (found.most, found.least, 5, 5, "t")


def test_shifted_copies_differ_by_the_shift_and_claim_no_interval():
    found = paired.difference([0.25] * 4, [0.25] * 4)
    assert found.least == 0.25 and (found.low, found.high, found.p) == (-INF, INF, None)
    one = paired.difference([0.3], [0.3])
    assert (one.least, one.low, one.high, one.p, one.n) == (0.3, -INF, INF, None, 1)


def test_a_miss_bounds_the_mean_on_one_side():
    """The fourth pair: the other side was still without its target at twice the steps."""
    least, most = [-0.5, -0.6, -0.4, -INF], [-0.5, -0.6, -0.4, -math.log(2)]
    found = paired.difference(least, most)
    assert found.least == -INF and found.most == pytest.approx(np.mean(most))
    assert found.low == -INF and found.high == pytest.approx(stats.ttest_1samp(most, 0).confidence_interval().high)
    assert (found.below, found.above, found.test) == (4, 0, "sign")
    assert found.p == pytest.approx(stats.binomtest(0, 4).pvalue)


def test_misses_on_both_sides_say_nothing_of_the_mean():
    found = paired.difference([-INF, 0.3, -INF], [-0.2, INF, INF])
    assert (found.least, found.most, found.low, found.high) == (-INF, INF, -INF, INF)
    assert (found.below, found.above, found.n, found.p) == (1, 1, 3, 1.0)


def test_paired_intervals_cover():
    rng, covered = np.random.default_rng(5), 0
    for _ in range(400):
        values = (0.5 + rng.normal(size=4)).tolist()
        found = paired.difference(values, values)
        covered += found.low <= 0.5 <= found.high
    assert 367 <= covered <= 393  # 380 +- 3 standard deviations


def test_holm_by_hand():
    assert paired.holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert paired.holm([0.5, 0.9]) == [1.0, 1.0] and paired.holm([None]) == [None]


def test_holm_holds_its_level():
    """Eight true nulls: some are called different in 5 % of all studies, not in 34 %."""
    p = np.random.default_rng(6).uniform(size=(1000, 8)).tolist()
    assert 30 <= sum(min(paired.holm(row)) < 0.05 for row in p) <= 70
    assert sum(min(row) < 0.05 for row in p) > 250


# --------------------------------------------------------------------------------------------------------------- profiles


def test_a_profile_by_hand():
    """One arm at 1, 2, never and 4 times the best; the other the best everywhere but where it missed too."""
    times = np.array([[10.0, 40.0, INF, 80.0, INF], [10.0, 20.0, 30.0, 20.0, INF]])
    found = profiles.ratios(times)
    assert found.tolist() == [[1, 2, INF, 4, INF], [1, 1, 1, 1, INF]]
    assert profiles.profile(found, [1, 2, 3.9, 4]).tolist() == [[0.2, 0.4, 0.4, 0.6], [0.8, 0.8, 0.8, 0.8]]
    assert profiles.score(found[:, :4])[0] == pytest.approx(5 / 12) and profiles.score(found[:, :4])[1] == 1
    assert profiles.score(found)[1] == pytest.approx(0.8)
    means, shared = profiles.mean_ratio(found)
    assert shared == 3 and means.tolist() == pytest.approx([2.0, 1.0])


def test_the_score_is_the_integral_of_the_profile():
    found = profiles.ratios(np.random.default_rng(7).lognormal(size=(3, 40)))
    taus = np.linspace(1, 4, 20_001)
    area = integrate.trapezoid(profiles.profile(found, taus.tolist()), taus, axis=1) / 3
    assert profiles.score(found) == pytest.approx(area, abs=1e-4)


def test_a_slower_arm_changes_no_score():
    times = np.random.default_rng(8).lognormal(size=(2, 20))
    more = np.vstack([times, 3 * times.max(axis=0)])
    assert profiles.score(profiles.ratios(more))[:2].tolist() == profiles.score(profiles.ratios(times)).tolist()


# ----------------------------------------------------------------------------------------------------------------- budget


def test_the_expected_best_by_enumeration():
    assert budget.expected_best([4, 2, 1, 3]) == pytest.approx([2.5, 5 / 3, 1.25, 1.0], rel=1e-12)
    values = np.random.default_rng(9).normal(size=9)
    every = [np.mean([min(c) for c in combinations(values, k)]) for k in range(1, 10)]
    assert budget.expected_best(values) == pytest.approx(every, rel=1e-12)


def test_chances_add_up_for_many_points():
    found = budget.weights(500)
    assert found.sum(axis=1) == pytest.approx(np.ones(500), abs=1e-9)
    assert found[0] == pytest.approx(np.full(500, 1 / 500)) and found[-1, 0] == pytest.approx(1)


def test_the_band_covers_small_budgets():
    """The expected best of 3 of 40 points from a uniform distribution is 1/4."""
    rng = np.random.default_rng(10)
    covered = 0
    for _ in range(60):
        low, high = budget.band(rng.uniform(size=40).tolist())
        covered += low[2] <= 0.25 <= high[2]
    assert 50 <= covered <= 60
