"""How well a law is known: 95 % intervals by three methods, the widest being quoted, and whether B_crit is identified.

Of open intervals none is the widest: where a method leaves an end open, the lowest and the highest end of all are quoted.

The profile likelihood takes misfit to be normal, alike at all batch sizes; the point bootstrap redraws batch sizes and does
not; the seed bootstrap redraws the trials at each batch size and shows what seeds alone would say, which is often too little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from orchestrator.batch_law.censored import Array
from orchestrator.batch_law.fit import Fit, Locations, fit, fit_many, locate, log_shape, profile, search_range, trials
from orchestrator.batch_law.law import Point
from orchestrator.statistics import LEVEL

DRAWS = 500  # of each bootstrap
FEWEST = 4  # batch sizes that reached the target, to identify a critical one
DISTINCT = 3  # batch sizes in a draw of the point bootstrap: two parameters fit two exactly
PROFILE, ZOOMS = 121, 3  # points of a likelihood profile, and how often it is drawn closer
QUANTITIES = ("critical", "steps_min", "examples_min")


@dataclass(frozen=True, slots=True)
class Interval:
    """0 and inf are open ends."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return math.log(self.high / self.low) if self.bounded else math.inf

    @property
    def bounded(self) -> bool:
        return self.low > 0 and self.high < math.inf


Intervals = dict[str, Interval]  # of each quantity


def _widest(intervals: Sequence[Interval]) -> Interval:
    """With an open one among them from the lowest end to the highest, so that no end is tighter than that of any method."""
    if all(i.bounded for i in intervals):
        return max(intervals, key=lambda i: i.width)
    return Interval(min(i.low for i in intervals), max(i.high for i in intervals))


@dataclass(frozen=True)
class Estimate:
    """The law of one curve and what is known of it."""

    fit: Fit
    at: Locations
    methods: dict[str, Intervals]  # "profile", "points" and, with repeated batch sizes, "seeds"

    @property
    def quoted(self) -> Intervals:
        return {q: _widest([method[q] for method in self.methods.values()]) for q in QUANTITIES}

    @property
    def reasons(self) -> list[str]:
        """Why B_crit is not identified; empty if it is."""
        reached, critical = self.at.batches[np.isfinite(self.at.upper)], self.fit.law.critical
        gates = {
            f"the target was reached at {len(reached)} batch sizes, not {FEWEST}": len(reached) < FEWEST,
            "the largest batch size is below half of it": reached[-1] < critical / 2,
            "the smallest batch size is above half of it": reached[0] > critical / 2,
            "its interval has an open end": not self.quoted["critical"].bounded,
        }
        return [reason for reason, holds in gates.items() if holds]

    @property
    def identified(self) -> bool:
        return not self.reasons

    @property
    def bound(self) -> tuple[str, float] | None:
        """What is left to say where B_crit is not identified: ("at least" | "at most", examples per step), if anything."""
        if self.identified:
            return None
        interval, middle = self.quoted["critical"], math.sqrt(self.at.batches[0] * self.at.batches[-1])
        ends = {"at least": interval.low, "at most": interval.high}
        order = ("at least", "at most") if self.fit.law.critical > middle else ("at most", "at least")
        return next(((word, ends[word]) for word in order if 0 < ends[word] < math.inf), None)


def estimate(points: Sequence[Point], draws: int = DRAWS) -> Estimate | None:
    """Fits one curve; None if the target was reached at fewer than three batch sizes, which say nothing about scatter.

    The generator of the bootstraps is fixed: the same points give the same intervals.
    """
    if len({p.batch for p in points if p.hit}) < DISTINCT:
        return None
    every = trials(points)
    at = locate(every)
    best = fit(at)
    methods = {"profile": profile_intervals(at), "points": _percentiles(*point_bootstrap(at, draws), at)}
    if len(every.lower) > len(at.batches):
        methods["seeds"] = _percentiles(*_seed_bootstrap(points, draws), at)
    return Estimate(best, at, methods)


# ---------------------------------------------------------------------------------------------------- profile likelihood


@dataclass(frozen=True)
class _Region:
    """Parameters that the likelihood does not rule out: for each ln B_crit, the middle of ln S_min and its reach."""

    log_critical: Array
    log_steps: Array
    half: Array
    open_below: bool  # the region reaches the end of the search for ln B_crit
    open_above: bool


def _region(at: Locations) -> _Region:
    """All parameters within reach of the largest likelihood.

    For n exact locations twice the drop in log likelihood is n ln(1 + F / (n - 2)), F being the statistic of a test of one
    parameter; so Student's t with n - 2 degrees of freedom gives the drop allowed, also for few batch sizes, for which that of
    chi squared is too small. At a given B_crit the likelihood in ln S_min is taken as that of a normal sample, which it is
    where all locations are exact.
    """
    n = at.hits
    drop = n / 2 * math.log1p(float(stdtrit(n - 2, (1 + LEVEL) / 2)) ** 2 / (n - 2))
    ends = edges = search_range(at.batches)
    for _ in range(ZOOMS):
        grid = np.linspace(*ends, PROFILE)
        likelihood, log_steps, scatter = profile(at, grid)
        inside = np.flatnonzero(likelihood >= likelihood.max() - drop)
        first, last = max(inside[0] - 1, 0), min(inside[-1] + 1, PROFILE - 1)
        ends = float(grid[first]), float(grid[last])
    room = np.expm1(2 / n * (likelihood[inside] - likelihood.max() + drop))
    half = scatter[inside] * np.sqrt(np.maximum(room, 0.0))
    found = grid[inside]
    return _Region(found, log_steps[inside], half, bool(found[0] <= edges[0]), bool(found[-1] >= edges[1]))


def profile_intervals(at: Locations) -> Intervals:
    """The range of each quantity over the region."""
    region = _region(at)
    critical, steps, half = region.log_critical, region.log_steps, region.half
    centres = {"critical": (critical, 0 * half), "steps_min": (steps, half), "examples_min": (steps + critical, half)}
    ends = {q: (float((c - h).min()), float((c + h).max())) for q, (c, h) in centres.items()}
    return _opened(ends, region.open_below, region.open_above)


def band(at: Locations, batches: Sequence[float]) -> list[Interval]:
    """The range of the steps at each of `batches` over the region: at any one of them, a 95 % interval of the law there."""
    region = _region(at)
    centre = region.log_steps[:, None] + log_shape(np.array(batches, dtype=float), region.log_critical)
    low, high = (centre - region.half[:, None]).min(0), (centre + region.half[:, None]).max(0)
    return [Interval(*pair) for pair in np.exp([low, high]).T.tolist()]


def _opened(ends: dict[str, tuple[float, float]], no_low: bool, no_high: bool) -> Intervals:
    """Log ends as intervals. B_crit without end upward leaves S_min none downward; without end downward, E_min none."""
    found = {q: Interval(math.exp(low), math.exp(high)) for q, (low, high) in ends.items()}
    if no_high:
        found["critical"] = Interval(found["critical"].low, math.inf)
        found["steps_min"] = Interval(0.0, found["steps_min"].high)
    if no_low:
        found["critical"] = Interval(0.0, found["critical"].high)
        found["examples_min"] = Interval(0.0, found["examples_min"].high)
    return found


# ------------------------------------------------------------------------------------------------------------ bootstraps


def point_bootstrap(at: Locations, draws: int) -> tuple[Array, Array]:
    """ln B_crit and ln S_min over draws of as many batch sizes, with replacement; three or more of them reached."""
    k = len(at.batches)
    weights = np.random.default_rng(0).multinomial(k, np.full(k, 1 / k), size=8 * draws).astype(float)
    enough = ((weights > 0) & np.isfinite(at.upper)).sum(-1) >= DISTINCT
    return fit_many(at, weights[enough][:draws])


def _seed_bootstrap(points: Sequence[Point], draws: int) -> tuple[Array, Array]:
    """The same over draws of as many trials at each batch size."""
    every = trials(points)
    generator, weights = np.random.default_rng(0), np.zeros((draws, len(every.lower)))
    for column in every.member.T:
        mine = np.flatnonzero(column)
        weights[:, mine] = generator.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), size=draws)
    at = locate(every, weights)
    return fit_many(at, np.ones((draws, len(every.batches))))


def _percentiles(log_critical: Array, log_steps: Array, at: Locations) -> Intervals:
    draws = {"critical": log_critical, "steps_min": log_steps, "examples_min": log_critical + log_steps}
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    ends = {q: tuple(map(float, np.quantile(v, tails, method="inverted_cdf"))) for q, v in draws.items()}
    low, high = search_range(at.batches)
    return _opened(ends, ends["critical"][0] <= low, ends["critical"][1] >= high)  # type: ignore[arg-type]
