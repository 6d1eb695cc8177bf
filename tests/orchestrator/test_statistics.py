"""Statistics over seeds against values worked out by hand, by enumeration, or by simulation."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from orchestrator.statistics import (
    Estimate,
    estimate,
    median,
    over_perfect,
    paired_ratio,
    regime,
    slopes,
    useful_batch,
    wilson,
)

INF = math.inf


@pytest.mark.parametrize(
    "values, expected",
    [
        ([3, 5, INF], 5),
        ([3, INF, INF], INF),
        ([3, 5], 4),
        ([3, INF], INF),
        ([INF, INF], INF),
        ([7], 7),
        ([INF, 5, 3], 5),
    ],
)
def test_a_miss_counts_as_infinite_in_a_median(values, expected):
    assert median(values) == expected


def test_a_median_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        median([])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_seeds_give_their_range_and_say_so(n):
    found = estimate(list(range(n, 0, -1)))
    assert (found.low, found.high, found.n, found.kind) == (1, n, n, "range")


@pytest.mark.parametrize(
    "n, k",  # tables of the sign test, two-sided 5 %
    [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (25, 8), (30, 10), (50, 18)],
)
def test_interval_of_the_median_is_the_tabled_order_statistic(n, k):
    found = estimate([float(i) for i in range(1, n + 1)])
    assert (found.low, found.high, found.kind) == (k, n + 1 - k, "95 % interval")


@pytest.mark.parametrize("n", [6, 9, 12])
def test_interval_covers_the_median_with_95_percent_by_enumeration(n):
    """All 2^n ways in which values may lie below (0) or above (1) the true median, each as likely."""
    k = int(estimate(list(range(1, n + 1))).low)
    covered = sum(k <= n - sum(sides) <= n - k for sides in product((0, 1), repeat=n))
    narrower = sum(k + 1 <= n - sum(sides) <= n - k - 1 for sides in product((0, 1), repeat=n))
    assert covered / 2**n >= 0.95 > narrower / 2**n


def test_interval_with_misses_reaches_to_infinity():
    assert estimate([40, 38, INF]) == Estimate(40, 38, INF, 3)


def test_wilson_gives_the_published_values():
    """Newcombe 1998, table I: 81 of 263 and 15 of 148, 0 of 20."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_is_symmetric_and_within_bounds():
    for n in range(1, 30):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n + 1e-15 and hits / n - 1e-15 <= high <= 1
            assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=1e-15)


def test_slopes_of_power_laws():
    batches = [32, 128, 1437]
    for power in (1.0, 0.5, 0.0):
        assert slopes(batches, [1000 * b**-power for b in batches]) == pytest.approx([power, power], abs=1e-12)
    assert not any(map(math.isfinite, slopes([1, 2, 4], [8, INF, INF])))


@pytest.mark.parametrize(
    "slope, name",
    [
        (1.0, "perfect"),
        (0.91, "perfect"),
        (0.9, "diminishing"),
        (0.1, "diminishing"),
        (0.09, "maximal data parallelism"),
    ],
)
def test_regimes(slope, name):
    assert regime(slope) == name


def test_useful_batch_ends_where_the_excess_passes_20_percent():
    batches = [32, 64, 128, 256]
    assert useful_batch(batches, [400, 200, 100, 50]) == 256
    assert useful_batch(batches, [400, 200, 120, 70]) == 128  # exactly 20 % is within
    assert useful_batch(batches, [400, 200, 121, 60]) == 64  # noise that comes back does not count
    assert useful_batch(batches, [400, INF, INF, INF]) == 32
    assert over_perfect(batches, [400, 200, 120, 75]) == pytest.approx([0, 0, 0.2, 0.5])


def test_two_parameter_law_is_useful_up_to_a_fifth_of_the_critical_batch():
    """S = S_min (1 + B_crit/B): S B / (S_0 B_0) <= 1.2 iff B + B_crit <= 1.2 (B_0 + B_crit)."""
    batches = [2**k for k in range(0, 14)]
    steps = [100 * (1 + 1000 / b) for b in batches]
    assert useful_batch(batches, steps) == max(b for b in batches if b + 1000 <= 1.2 * 1001)


def test_paired_ratio_of_shifted_copies_is_the_shift_exactly():
    a = [100.0, 140.0, 90.0, 210.0, 130.0, 75.0, 160.0]
    found = paired_ratio([2 * x for x in a], a)
    assert found is not None
    assert (found.median, found.low, found.high) == pytest.approx((2, 2, 2), rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_paired_ratio_of_few_pairs_spans_their_range(n):
    a = [float(3 + i * i) for i in range(n)]
    found = paired_ratio(a, [1.0] * n)
    assert found is not None
    assert (found.low, found.high, found.kind) == (pytest.approx(min(a)), pytest.approx(max(a)), "range")


def test_paired_ratio_turns_over_with_its_sides():
    a, b = [10.0, 14, 9, 21, 13, 8], [11.0, 12, 12, 18, 16, 9]
    forth, back = paired_ratio(a, b), paired_ratio(b, a)
    assert forth and back
    assert forth.median == pytest.approx(1 / back.median)
    assert forth.low == pytest.approx(1 / back.high, rel=0.05)


def test_pairs_missed_on_both_sides_say_nothing_and_one_sided_misses_do():
    assert paired_ratio([INF, INF], [INF, INF]) is None
    found = paired_ratio([10, INF, 10], [20, INF, INF])
    assert found and (found.median, found.low, found.high, found.n) == (0, 0, pytest.approx(0.5, rel=1e-12), 2)
    assert paired_ratio([10, INF], [INF, 10]) == Estimate(1.0, 0.0, INF, 2)


def test_paired_bootstrap_covers_the_true_ratio():
    """200 studies of 9 seeds, log-normal noise, true ratio 1.3: a 95 % interval misses about 10; 25 would be 5 sigma."""
    noise = np.random.default_rng(1).normal(0, 0.2, (200, 9))
    covered = 0
    for row in noise:
        found = paired_ratio(list(1.3 * np.exp(row)), [1.0] * 9)
        assert found is not None
        covered += found.low <= 1.3 <= found.high
    assert covered >= 175


def test_overlap_is_closed_and_symmetric():
    a, b, c = Estimate(5, 3, 7, 3), Estimate(8, 7, 9, 3), Estimate(9, 7.5, INF, 3)
    assert a.overlaps(b) and b.overlaps(a)
    assert not a.overlaps(c) and not c.overlaps(a)
