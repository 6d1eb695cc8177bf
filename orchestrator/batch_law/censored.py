"""Normal samples of which some values are known to lie in an interval only: likelihood, and its maximum by EM."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

Array = NDArray[np.float64]
ROUNDS, TOLERANCE = 60, 2e-5  # of EM, on a log scale
NARROWEST = 1e-3  # scatter of intervals that a single curve meets: it has no lower bound of its own then
TINY = 1e-15  # scatter of values that are equal
LOG_ROOT_TWO_PI = 0.5 * np.log(2 * np.pi)


def maximise(
    lower: Array, upper: Array, refit: Callable[[Array], Array], weights: Array | None = None
) -> tuple[Array, Array, Array]:
    """Means and scatter of y ~ N(mean, scatter^2) with lower <= y <= upper, at the largest likelihood.

    `refit` gives the least-squares means of complete values, shape (..., n) to (..., n): it decides what means are possible.
    `weights` of the n values default to 1. Returns means (..., n), scatter (..., 1) and the expected values (..., n).

    EM (Dempster, Laird and Rubin 1977): replace each value by its expectation within its bounds, refit, repeat.
    """
    share = np.ones_like(lower) if weights is None else weights
    share = share / np.maximum(share.sum(-1, keepdims=True), TINY)
    values = np.where(np.isinf(upper), lower, np.where(np.isinf(lower), upper, (lower + upper) / 2))
    exact = lower == upper
    means, variances = refit(values), np.zeros_like(values)
    smallest = TINY if exact.all() else NARROWEST
    scatter = _scatter(share, values - means, variances, smallest)
    for _ in range(0 if exact.all() else ROUNDS):
        before = values
        values, variances = _moments(lower, upper, means, scatter)
        means = refit(values)
        scatter = _scatter(share, values - means, variances, smallest)
        if np.max(np.abs(values - before)) < TOLERANCE:
            break
    return means, scatter, values


def _scatter(share: Array, residuals: Array, variances: Array, smallest: float) -> Array:
    return np.maximum(np.sqrt((share * (residuals**2 + variances)).sum(-1, keepdims=True)), smallest)


def log_likelihood(lower: Array, upper: Array, means: Array, scatter: Array) -> Array:
    """Of each value, same shape: the density where the bounds are equal, else the probability between them."""
    exact = lower == upper
    density = -0.5 * ((np.where(exact, lower, means) - means) / scatter) ** 2 - LOG_ROOT_TWO_PI - np.log(scatter)
    low, high = _standard(lower, upper, means, scatter)
    return np.where(exact, density, _log_mass(low, high))


def _standard(lower: Array, upper: Array, means: Array, scatter: Array) -> tuple[Array, Array]:
    """Bounds in units of the scatter, mirrored so that the lower one is not positive: far tails keep their digits there."""
    low, high = (lower - means) / scatter, (upper - means) / scatter
    return np.where(low > 0, -high, low), np.where(low > 0, -low, high)


def _log_mass(low: Array, high: Array) -> Array:
    with np.errstate(divide="ignore"):
        return log_ndtr(high) + np.log(-np.expm1(log_ndtr(low) - log_ndtr(high)))


def _moments(lower: Array, upper: Array, means: Array, scatter: Array) -> tuple[Array, Array]:
    """Mean and variance of a normal value between its bounds; of one known exactly, itself and 0."""
    low, high = _standard(lower, upper, means, scatter)
    mass = _log_mass(low, high)
    with np.errstate(invalid="ignore", over="ignore"):
        at_low, at_high = (np.exp(-0.5 * end**2 - LOG_ROOT_TWO_PI - mass) for end in (low, high))
        shift = at_low - at_high
        spread = 1 - shift**2 + np.nan_to_num(low * at_low) - np.nan_to_num(high * at_high)
        value = means + scatter * np.where((lower - means) > 0, -shift, shift)
    value = np.where(np.isnan(value), lower, np.clip(value, lower, upper))
    variance = np.clip(np.nan_to_num(spread), 0, 1) * scatter**2
    exact = lower == upper
    return np.where(exact, lower, value), np.where(exact, 0.0, variance)
