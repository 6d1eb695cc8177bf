"""The gradient noise scale B_simple = tr(Sigma) / |G|^2 over stretches of training, with intervals.

It is a ratio of averages: single estimates of |G|^2 scatter about zero, so an average of ratios would be far off (McCandlish
et al. 2018, arXiv 1812.06162). Neighbouring rows of a trial are alike, so the scatter of both averages is that of blocks of
rows: the variance of a circular moving-block bootstrap (Politis and Romano 1992), which has a closed form. The interval is
Fieller's (1954) with Student's t: the ratios R for which average trace - R x average signal may be zero. It has no upper end
where the signal may be zero. The percentiles of bootstrapped ratios fall well short of 95 % there, and for few blocks.

Blocks have the length that is best for a first-order autoregression (Politis and White 2004, Econometric Reviews 23),
(sqrt(6) rho / (1 - rho^2))^(2/3) n^(1/3) of n rows, rho the correlation of neighbours, estimated; never above n / 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.polynomial.chebyshev import chebvander
from numpy.typing import NDArray
from scipy.special import stdtrit

from orchestrator.statistics import LEVEL

Array = NDArray[np.float64]
FEWEST = 8  # rows; with fewer there is no interval
ROWS = 16  # of all trials together, for a stretch
STRETCHES = 12  # at most
BLOCKS = 5  # at least
TREND, TRENDS = 3, 192  # degree of the trend of a whole run, and rows from which it is taken out
ALIKE = 0.97  # correlation of neighbours, at most


@dataclass(frozen=True)
class Series:
    """The rows of one trial. Each array has shape (rows,)."""

    trace: Array  # average of tr(Sigma) since the row before
    signal: Array  # of |G|^2; an estimate may be negative
    weight: Array  # examples that the averages are over
    examples: Array  # seen in all, growing

    def between(self, first: float, last: float) -> Series:
        """The rows written after `first` examples, up to `last`."""
        inside = (self.examples > first) & (self.examples <= last)
        return Series(*(a[inside] for a in (self.trace, self.signal, self.weight, self.examples)))


@dataclass(frozen=True, slots=True)
class Ratio:
    """A noise scale in examples with its 95 % interval; inf: no signal was found, or none may be there."""

    value: float
    low: float
    high: float
    rows: int
    block: int  # rows that were taken together


@dataclass(frozen=True, slots=True)
class Stretch:
    first: float  # examples seen
    last: float
    scale: Ratio


def ratio(trials: Sequence[Series], trend: int = 0) -> Ratio:
    """Average trace over average signal, in all rows of all trials. Raises ValueError without rows.

    What a polynomial of degree `trend` in the examples seen explains of either is no scatter.
    """
    filled = [t for t in trials if len(t.trace)]
    if not filled:
        raise ValueError("a noise scale needs at least one row")
    trace, signal = (float(sum((getattr(t, name) * t.weight).sum() for t in filled)) for name in ("trace", "signal"))
    value = trace / signal if signal > 0 else math.inf
    off = _residuals(filled, trend)
    rows, block = sum(map(len, off)), _block(off, value)
    if rows < FEWEST:
        return Ratio(value, 0.0, math.inf, rows, block)
    sums = np.concatenate([_block_sums(o, block) for o in off])
    freedom = (rows - trend - 1) / block
    reach = float(stdtrit(freedom, (1 + LEVEL) / 2)) ** 2 * rows / (rows - trend - 1)
    return Ratio(
        value, *_fieller(trace, signal, reach * rows / block * np.cov(sums, rowvar=False, ddof=0)), rows, block
    )


def along(trials: Sequence[Series]) -> list[Stretch]:
    """Equal stretches of examples seen: 12, or fewer that have 16 rows each on average; those without rows are left out."""
    end = max((float(t.examples[-1]) for t in trials if len(t.examples)), default=0.0)
    count = min(STRETCHES, sum(len(t.trace) for t in trials) // ROWS) or 1
    edges = np.linspace(0.0, end, count + 1).tolist()
    found = [(a, b, [t.between(a, b) for t in trials]) for a, b in pairwise(edges)]
    return [Stretch(a, b, ratio(part)) for a, b, part in found if any(len(t.trace) for t in part)]


def whole(trials: Sequence[Series]) -> Ratio:
    """Of the whole run, whose trend is no scatter of its average."""
    return ratio(trials, TREND if sum(len(t.trace) for t in trials) >= TRENDS else 0)


def _residuals(trials: Sequence[Series], trend: int) -> list[Array]:
    """Of each trial (rows, 2): trace and signal off their common trend, by weight."""
    values = np.concatenate([np.stack([t.trace, t.signal], axis=1) for t in trials])
    examples = np.concatenate([t.examples for t in trials])
    basis = chebvander(2 * examples / examples.max() - 1, trend)
    off = values - basis @ np.linalg.lstsq(basis, values, rcond=None)[0]
    off = off * np.concatenate([t.weight for t in trials])[:, None]
    return np.split(off, np.cumsum([len(t.trace) for t in trials])[:-1])


def _block(off: Sequence[Array], value: float) -> int:
    """Rows per block, from the correlation of neighbours in what decides the ratio R: trace - R x signal."""
    decides = [o[:, 0] - value * o[:, 1] if math.isfinite(value) else o[:, 1] for o in off]
    rows, power = sum(map(len, off)), sum(float(d @ d) for d in decides)
    rho = sum(float(d[1:] @ d[:-1]) for d in decides) / power if power > 0 else 0.0
    rho = min(max(rho, 0.0), ALIKE)
    best = (math.sqrt(6) * rho / (1 - rho**2)) ** (2 / 3) * rows ** (1 / 3)
    return max(1, min(math.ceil(best), rows // BLOCKS))


def _block_sums(pairs: Array, block: int) -> Array:
    """(rows, 2): sums over the `block` rows from each row on, the first row following the last."""
    index = np.arange(len(pairs))[:, None] + np.arange(block)
    return np.asarray(pairs.take(index, axis=0, mode="wrap").sum(axis=1))


def _fieller(trace: float, signal: float, scatter: Array) -> tuple[float, float]:
    """The R >= 0 with (trace - R signal)^2 <= variance of that difference x t^2; `scatter` (2, 2) includes t^2."""
    a, b, c = signal**2 - scatter[1, 1], trace * signal - scatter[0, 1], trace**2 - scatter[0, 0]
    root = math.sqrt(max(b * b - a * c, 0.0))
    if a > 0:  # the signal is not zero; where it is below, no scale is large enough
        return (max(float((b - root) / a), 0.0), float((b + root) / a)) if signal > 0 else (math.inf, math.inf)
    if c <= 0 or b + root <= 0:
        return 0.0, math.inf
    return float(c / (b + root)), math.inf
