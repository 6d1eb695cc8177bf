"""The law fitted by maximum likelihood.

What is observed is one location per batch size, the mean of the log steps of its trials. Trials at one batch size share how
well it was tuned and how far the law is off there, so ten more seeds of it are not ten more observations of the law. Locations
scatter about the law, ln S_i ~ N(ln S_min + ln(1 + B_crit / B_i), s^2), whatever the number of their trials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.batch_law.censored import Array, log_likelihood, maximise
from orchestrator.batch_law.law import Law, Point

REACH = 7.0  # of the search for ln B_crit beyond the batch sizes tried: a factor of 1100 on both sides
STARTS = 161  # over that range
FINER = 41  # points of a zoom, which divides the spacing by 20
CLOSE, EXACT = 1e-4, 1e-13  # spacing to stop at: EM ends short of the maximum, which exact locations do not need


@dataclass(frozen=True)
class Trials:
    """Log steps of n trials at k batch sizes, sorted."""

    batches: Array  # (k,)
    member: Array  # (n, k), 1 where the trial has the batch size
    lower: Array  # (n,)
    upper: Array  # (n,)


@dataclass(frozen=True)
class Locations:
    """Log steps per batch size, as bounds; draws of a bootstrap come as leading axes of the bounds."""

    batches: Array  # (k,)
    lower: Array  # (..., k)
    upper: Array  # (..., k)

    @property
    def hits(self) -> int:
        """Batch sizes at which the target was reached."""
        return int(np.isfinite(self.upper).sum())


@dataclass(frozen=True)
class Fit:
    law: Law
    scatter: float  # s, of the locations about the law on the log scale
    residuals: Array  # (k,) log steps over the law's; nan where the target was never reached

    @property
    def rms(self) -> float:
        return float(np.sqrt(np.nanmean(self.residuals**2)))


def trials(points: Sequence[Point]) -> Trials:
    """Misses before the first evaluation say nothing and are left out."""
    told = [p for p in points if p.lower > 0 or p.hit]
    batches = np.unique([float(p.batch) for p in told])
    member = np.equal.outer([p.batch for p in told], batches).astype(float).reshape(len(told), len(batches))
    with np.errstate(divide="ignore"):
        lower, upper = (np.log(np.array([getattr(p, end) for p in told], dtype=float)) for end in ("lower", "upper"))
    return Trials(batches, member, lower, upper)


def locate(trials: Trials, weights: Array | None = None) -> Locations:
    """The location at each batch size, its trials scattering alike everywhere; `weights` (..., n) count each trial.

    Where all trials say the same - one trial, one evaluation interval, one budget without a hit - these are its bounds.
    Where none reached the target, all that is known is that the mean of their logs exceeds the mean of their lower bounds.
    """
    counts = np.ones_like(trials.lower) if weights is None else weights
    total = counts @ trials.member
    hit = ((counts * np.isfinite(trials.upper)) @ trials.member > 0) @ trials.member.T
    lower = np.broadcast_to(trials.lower, counts.shape)
    upper = np.where(hit, trials.upper, lower)

    def to_means(values: Array) -> Array:
        return (counts * values) @ trials.member / total @ trials.member.T

    means, _, _ = maximise(lower, upper, to_means, counts * hit)
    centres = (counts * means) @ trials.member / total
    (first, last), (low, high) = (_extremes(b, counts, trials.member) for b in (lower, np.where(hit, upper, np.inf)))
    same = (first == last) & (low == high)
    return Locations(trials.batches, np.where(same, first, centres), np.where(same | np.isinf(low), low, centres))


def _extremes(bounds: Array, counts: Array, member: Array) -> tuple[Array, Array]:
    """Smallest and largest bound at each batch size, of the trials that count."""
    present = (counts > 0)[..., None] & (member > 0)
    smallest = np.where(present, bounds[..., None], np.inf).min(-2)
    return smallest, np.where(present, bounds[..., None], -np.inf).max(-2)


def log_shape(batches: Array, log_critical: Array) -> Array:
    """ln(S / S_min) at each batch size, shape (..., k) for log critical batch sizes (...)."""
    return np.logaddexp(0.0, np.asarray(log_critical)[..., None] - np.log(batches))


def search_range(batches: Array) -> tuple[float, float]:
    """Of ln B_crit."""
    return float(np.log(batches[0])) - REACH, float(np.log(batches[-1])) + REACH


def profile(at: Locations, log_critical: Array) -> tuple[Array, Array, Array]:
    """For each ln B_crit, shape (g,): the largest log likelihood, and the ln S_min and scatter that give it."""
    shape = log_shape(at.batches, log_critical)
    lower, upper = at.lower - shape, at.upper - shape
    means, scatter, _ = maximise(lower, upper, lambda y: np.broadcast_to(y.mean(-1, keepdims=True), y.shape))
    return log_likelihood(lower, upper, means, scatter).sum(-1), means[:, 0], scatter[:, 0]


def fit(at: Locations) -> Fit:
    """The most likely law. Raises ValueError with fewer than two batch sizes at which the target was reached."""
    if at.hits < 2:
        raise ValueError("a fit needs the target reached at two batch sizes or more")
    grid = np.linspace(*search_range(at.batches), STARTS)
    best = grid[np.argmax(profile(at, grid)[0])]
    step = grid[1] - grid[0]
    while step > (EXACT if np.array_equal(at.lower, at.upper) else CLOSE):
        near = np.linspace(best - step, best + step, FINER)
        best, step = near[np.argmax(profile(at, near)[0])], near[1] - near[0]
    _, log_steps, scatter = (float(v[0]) for v in profile(at, np.array([best])))
    law = Law(float(np.exp(log_steps)), float(np.exp(best)))
    expected = log_steps + log_shape(at.batches, best)
    nearest = np.clip(expected, at.lower, at.upper)
    return Fit(law, scatter, np.where(np.isfinite(at.upper), nearest - expected, np.nan))


def fit_many(at: Locations, weights: Array) -> tuple[Array, Array]:
    """ln B_crit and ln S_min for each draw of a bootstrap, shape (d,); `weights` (d, k) count each batch size.

    Bounds may be (k,) or (d, k). Each M-step of the EM looks at all of a grid of B_crit at once and refines its best point by a
    parabola, so no draw is stuck where another started.
    """
    grid = np.linspace(*search_range(at.batches), STARTS)
    shapes = log_shape(at.batches, grid)
    share = weights / weights.sum(-1, keepdims=True)
    spread = share @ shapes.T**2 - (share @ shapes.T) ** 2
    lower, upper = (np.broadcast_to(b, weights.shape) for b in (at.lower, at.upper))
    found: list[Array] = []

    # einsum, as the threads of a matrix product that is this small wait for each other most of the time
    def to_law(values: Array) -> Array:
        centred = values - (share * values).sum(-1, keepdims=True)
        log_critical = _valley(spread - np.einsum("dk,gk->dg", 2 * share * centred, shapes), grid)
        shape = log_shape(at.batches, log_critical)
        log_steps = (share * (values - shape)).sum(-1, keepdims=True)
        found[:] = [log_critical, log_steps[:, 0]]
        return shape + log_steps

    maximise(lower, upper, to_law, weights)
    return found[0], found[1]


def _valley(heights: Array, grid: Array) -> Array:
    """Where each row of (d, g) is lowest, between the points of the grid."""
    at = np.clip(np.argmin(heights, -1), 1, len(grid) - 2)[:, None]
    before, here, after = (np.take_along_axis(heights, at + shift, -1)[:, 0] for shift in (-1, 0, 1))
    curvature = before - 2 * here + after
    offset = np.where(curvature > 0, 0.5 * (before - after) / np.where(curvature > 0, curvature, 1), 0.0)
    lowest = np.argmin(heights, -1)
    edge = (lowest == 0) | (lowest == len(grid) - 1)
    return np.where(edge, grid[lowest], grid[at[:, 0]] + np.clip(offset, -1, 1) * (grid[1] - grid[0]))
