"""Intervals of the law: that they hold the truth as often as they say, and that what is not identified is not called so."""

from __future__ import annotations

import math

import pytest

from orchestrator.batch_law.curve import Curve, as_data, as_text
from orchestrator.batch_law.fit import locate, trials
from orchestrator.batch_law.intervals import QUANTITIES, Estimate, Interval, band, estimate, profile_intervals
from orchestrator.batch_law.law import Law, Point
from orchestrator.batch_law.table import read
from tests.orchestrator.batch_law_curves import POWERS, PUBLIC, TRUTH, made

CURVES = {curve.name: curve for curve in read(PUBLIC)}


def known(points: list[Point], draws: int = 200) -> Estimate:
    found = estimate(points, draws)
    assert found
    return found


def covered(studies: int, **how: float) -> dict[str, int]:
    """In how many studies the profile interval of each quantity holds the truth."""
    found = [profile_intervals(locate(trials(made(1000 + seed, **how)))) for seed in range(studies)]
    return {q: sum(i[q].low <= getattr(TRUTH, q) <= i[q].high for i in found) for q in QUANTITIES}


def test_profile_intervals_cover_the_truth():
    assert all(90 <= hits <= 98 for hits in covered(100).values()), covered(100)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"grain": 250}, {"budget": 17_000}, {"trials": 1}], ids=str)
def test_profile_intervals_cover_the_truth_over_many_studies(how):
    """The standard error of a coverage of 95 % over 400 studies is 1.1 %. Evaluation every 250 steps blurs large batch sizes
    alone; the scatter, being the same for all, then makes the interval of E_min, which small ones decide, wide."""
    hits = covered(400, **how)
    assert all(n >= 0.91 * 400 for n in hits.values()) and hits["critical"] <= 0.98 * 400, hits


def test_few_batch_sizes_are_covered_too():
    """With five, chi squared in place of Student's t would cover 85 %."""
    found = [
        profile_intervals(locate(trials(made(seed, batches=POWERS[1::2], trials=3))))["critical"] for seed in range(200)
    ]
    assert 0.90 * 200 <= sum(i.low <= 512 <= i.high for i in found) <= 0.985 * 200


def test_published_intervals_of_resnet50():
    """Published: points 42.9 to 53.6 thousand, seeds 46.4 to 47.8 thousand."""
    methods = known(list(CURVES["resnet50_lars"].points), 1000).methods
    points, seeds = methods["points"]["critical"], methods["seeds"]["critical"]
    assert (points.low, points.high) == pytest.approx((42_900, 53_600), rel=0.02)
    assert (seeds.low, seeds.high) == pytest.approx((46_400, 47_800), rel=0.005)


@pytest.mark.parametrize("name", CURVES)
def test_public_curves_identify_their_critical_batch_size(name):
    found = known(list(CURVES[name].points))
    assert found.identified and found.bound is None
    for quantity, quoted in found.quoted.items():
        widths = [method[quantity].width for method in found.methods.values()]
        assert quoted.width == max(widths)
        assert quoted.low < getattr(found.fit.law, quantity) < quoted.high
    assert ("seeds" in found.methods) == (len(CURVES[name].points) > len(found.at.batches))


def test_intervals_are_the_same_each_time():
    assert known(made(4)).methods == known(made(4)).methods


# ---------------------------------------------------------------------------------------------------------- identification

PERFECT, FLAT = Law(1e-3, 1e9), Law(1000, 1e-3)  # scaling without end, and none at all


@pytest.mark.parametrize("seed", range(3))
def test_perfect_scaling_leaves_a_lower_bound(seed):
    found = known(made(seed, PERFECT, POWERS[:8], trials=10, noise=0.2))
    assert not found.identified and found.quoted["critical"].high == math.inf
    assert found.bound == ("at least", found.quoted["critical"].low)
    assert found.methods["profile"]["critical"].low > POWERS[7] / 2  # bootstraps may reach further down
    assert found.quoted["examples_min"].low < PERFECT.examples_min < found.quoted["examples_min"].high
    assert found.quoted["steps_min"].low == 0


@pytest.mark.parametrize("seed", range(3))
def test_no_scaling_leaves_an_upper_bound(seed):
    found = known(made(seed, FLAT, POWERS[:8], trials=10))
    assert not found.identified and found.quoted["critical"].low == 0
    assert found.bound == ("at most", found.quoted["critical"].high) and found.bound[1] < POWERS[0]
    assert found.quoted["steps_min"].low < 1000 < found.quoted["steps_min"].high


def test_batch_sizes_on_one_side_do_not_identify():
    below = known(made(0, batches=[2.0**i for i in range(7)]))
    assert "the largest batch size is below half of it" in below.reasons
    assert below.bound and below.bound[0] == "at least" and below.bound[1] <= 512
    assert below.quoted["examples_min"].low < 512_000 < below.quoted["examples_min"].high
    above = known(made(0, batches=[2.0**i for i in range(11, 17)]))
    assert "the smallest batch size is above half of it" in above.reasons
    assert above.bound and above.bound[0] == "at most" and above.bound[1] >= 512


@pytest.mark.parametrize("seed", [0, 2, 3, 9])
def test_a_bound_is_no_tighter_than_the_end_of_any_method(seed):
    """Where a method leaves its interval open: one of the others may reach further down all the same."""
    found = known(made(seed, batches=[8.0, 16.0, 32.0, 64.0, 128.0], trials=2))
    ends = [method["critical"] for method in found.methods.values()]
    lowest = min(interval.low for interval in ends)
    assert found.quoted["critical"] == Interval(lowest, math.inf) and found.bound == ("at least", lowest)


def test_without_trials_or_with_misses_alone_there_is_no_law():
    assert estimate([]) is None
    assert estimate([Point(b, 0, math.inf) for b in (8, 32, 128, 512)]) is None
    assert estimate([Point(b, 100, math.inf) for b in (8, 32, 128, 512)]) is None


def test_four_batch_sizes_are_needed():
    three = known(made(0, batches=(64, 512, 4096), noise=0.02))
    assert three.reasons == ["the target was reached at 3 batch sizes, not 4"]
    missed = known(made(0, batches=(16, 64, 512, 4096), noise=0.02, budget=20_000))
    assert missed.reasons == three.reasons
    assert known(made(0, batches=(32, 64, 512, 4096), noise=0.02)).identified
    assert estimate(made(0, batches=(64, 512))) is None


def test_evaluations_too_coarse_say_nothing():
    points = [Point(b, 0, 100) for b in (8, 32, 128, 512)]
    assert not known(points).identified and known(points).bound is None
    assert "unknown" in as_text([as_data(Curve("coarse", points))])


def test_band_of_the_law():
    at = locate(trials(made(3)))
    intervals = profile_intervals(at)
    ends = band(at, [1e-9, 64, 1e12])
    assert ends[0].low * 1e-9 == pytest.approx(intervals["examples_min"].low, rel=1e-6)
    assert ends[2].high == pytest.approx(intervals["steps_min"].high, rel=1e-6)
    assert ends[1].low < TRUTH.steps(64) < ends[1].high < 1.1 * ends[1].low
    covering = [band(locate(trials(made(seed, trials=1))), [128])[0] for seed in range(100)]
    assert 90 <= sum(i.low <= TRUTH.steps(128) <= i.high for i in covering) <= 98


def test_width_of_an_interval():
    assert Interval(1, math.e).width == 1
    assert Interval(0, 5).width == Interval(5, math.inf).width == math.inf
