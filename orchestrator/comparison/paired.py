"""Differences between two arms on the same seeds: their mean, an interval, a test, and Holm's correction for many tests.

What a seed decides is shared by both sides, so differences scatter less than sides do (Bouthillier et al. 2021). A trial that
missed its target is known to have taken more steps than it ran, so a pair has a range of differences, and nothing is
left out: the mean then has a bound where it has no value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, stdtr, stdtrit

from orchestrator.statistics import LEVEL

Array = NDArray[np.float64]
ROUNDING = 1e-12  # of the largest difference: below, all differences are the same


@dataclass(frozen=True, slots=True)
class Difference:
    """Of `n` pairs. `least` and `most` bound the mean and are the same where all differences are known."""

    least: float
    most: float
    low: float  # of the 95 % interval; not finite where nothing can be said
    high: float
    n: int
    below: int  # pairs whose difference is below zero for certain
    above: int
    # two-sided; None for one pair, for equal differences, whose scatter is not known, and without a sign
    p: float | None
    test: str  # "t" or "sign"


def difference(low: Sequence[float], high: Sequence[float]) -> Difference:
    """The mean over pairs; the difference of pair i is known to lie between low[i] and high[i], where they differ strictly.

    Ends may be infinite. Known differences: Student's t. Otherwise the interval runs from the lower limit of the least
    differences to the upper limit of the greatest, so it is no shorter than it may be, and the test is the sign test over
    the pairs whose sign is known. Raises ValueError without pairs.
    """
    least, most = np.array(low, dtype=float), np.array(high, dtype=float)
    if not len(least):
        raise ValueError("a difference needs at least one pair")
    known = bool(np.array_equal(least, most))
    ranges = least < most
    below, above = int(((most < 0) | ranges & (most == 0)).sum()), int(((least > 0) | ranges & (least == 0)).sum())
    ends = _limit(least, -1.0), _limit(most, 1.0)
    p = _t_test(least) if known else _sign_test(below, above, len(least))
    means = float(least.mean()), float(most.mean())
    return Difference(*means, *ends, len(least), below, above, p, "t" if known else "sign")


def _alike(values: Array) -> bool:
    """Whether the scatter of the values cannot be told: one, or several that are the same."""
    return len(values) < 2 or float(np.ptp(values)) <= ROUNDING * float(np.abs(values).max())


def _limit(values: Array, side: float) -> float:
    """One end of the t interval of the mean; without end where a value is infinite or scatter is not known."""
    if not np.isfinite(values).all() or _alike(values):
        return side * math.inf
    return float(values.mean() + side * stdtrit(len(values) - 1, (1 + LEVEL) / 2) * _error(values))


def _error(values: Array) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _t_test(values: Array) -> float | None:
    return None if _alike(values) else float(2 * stdtr(len(values) - 1, -abs(values.mean()) / _error(values)))


def _sign_test(below: int, above: int, n: int) -> float | None:
    """Exact; pairs whose sign is not known say nothing, and without another there is no test."""
    if n < 2 or not below + above:
        return None
    return min(1.0, 2 * float(bdtr(min(below, above), below + above, 0.5)))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values (Holm 1979): those below 5 % are wrong, even one of them, with 5 % at most. None stays None."""
    order = sorted((value, i) for i, value in enumerate(p) if value is not None)
    adjusted: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, i) in enumerate(order):
        largest = max(largest, min(1.0, value * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted
