"""What seeds allow one to say: medians with misses, intervals, scaling with the batch size, paired comparisons. No files.

A trial that never reached its target is a miss, written as +inf: it sorts behind every hit, so medians and order
statistics need no further rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95  # of every interval here
ENOUGH = 6  # values: with fewer, not even the range covers the median with 95 %
EXCESS = 0.2  # over perfect scaling, up to which a batch size counts as useful
DRAWS = 10_000  # resamples of a bootstrap


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and what is known of it: the range of the values if n < 6, else a 95 % interval."""

    median: float
    low: float
    high: float
    n: int

    @property
    def kind(self) -> str:
        return "range" if self.n < ENOUGH else "95 % interval"

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a point: then neither side may be called the better one."""
        return self.low <= other.high and other.low <= self.high


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle; misses are +inf. Raises ValueError without values."""
    if not len(values):
        raise ValueError("a median needs at least one value")
    return float(np.median(np.asarray(values, dtype=float)))


def estimate(values: Sequence[float]) -> Estimate:
    """The median with its interval from order statistics; no assumption on the distribution.

    The number of values below the median is Binomial(n, 1/2), so [k-th smallest, k-th largest] covers it with
    1 - 2 P(Binomial(n, 1/2) < k); k is the largest that keeps 95 % (Thompson 1936, Annals of Mathematical Statistics 7).
    Below six values no k does: the interval is the range, and says so.
    """
    ordered = sorted(map(float, values))
    k = max(1, _rank(len(ordered)))
    return Estimate(median(ordered), ordered[k - 1], ordered[-k], len(ordered))


def _rank(n: int) -> int:
    """The largest k with P(Binomial(n, 1/2) < k) <= 2.5 %; 0 if there is none."""
    below, k = 1, 0  # `below`: ways to have at most k values below the median
    while below / 2**n <= (1 - LEVEL) / 2:
        k += 1
        below += math.comb(n, k)
    return k


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate, `hits` of `n` (Wilson 1927, JASA 22); (0, 1) if n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    rate, shrink = hits / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def slopes(batches: Sequence[float], steps: Sequence[float]) -> list[float]:
    """-d log S / d log B from each batch size to the next: 1 is perfect scaling, 0 none. Not finite next to a miss.

    `batches` strictly increasing; one slope less than batches.
    """
    with np.errstate(invalid="ignore"):
        return list(map(float, -np.diff(np.log(steps)) / np.diff(np.log(batches))))


def regime(slope: float) -> str:
    """Name of the stretch of scaling. The three regimes are those of Shallue et al. 2019 (JMLR 20:112), who draw no lines
    between them; the thresholds 0.9 and 0.1 are ours."""
    if slope > 0.9:
        return "perfect"
    return "diminishing" if slope >= 0.1 else "maximal data parallelism"


def over_perfect(batches: Sequence[float], steps: Sequence[float]) -> list[float]:
    """By how much each batch size exceeds the steps that perfect scaling from the first one foresees; 0.2 is 20 % more."""
    return [s * b / (steps[0] * batches[0]) - 1 for b, s in zip(batches, steps, strict=True)]


def useful_batch(batches: Sequence[float], steps: Sequence[float]) -> float:
    """The largest batch size up to which steps exceed perfect scaling from the first one by 20 % at most.

    `batches` increasing, `steps` to target with a finite first entry. A batch size beyond the first that fails does not
    count, even if noise puts it back under the line.
    """
    last = batches[0]
    for batch, over in zip(batches, over_perfect(batches, steps), strict=True):
        if over > EXCESS + 1e-12:  # 48 steps where 40 are perfect are 20 % more, whatever rounding says
            break
        last = batch
    return last


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> Estimate | None:
    """Median of a/b over pairs (the same seed on both sides), with the percentile bootstrap of its logarithm.

    Pairs share what the seed decides, so their ratio varies less than the ratio of two medians (Bouthillier et al. 2021,
    "Accounting for variance in machine learning benchmarks"). Pairs in which both sides missed say nothing and are left
    out; None if none is left. For fewer than six pairs the bootstrap gives their range, and the estimate is named so.
    """
    pairs = np.array([(x, y) for x, y in zip(a, b, strict=True) if min(x, y) < math.inf], dtype=float)
    if not len(pairs):
        return None
    logs = np.log(pairs[:, 0]) - np.log(pairs[:, 1])
    draws = np.random.default_rng(0).integers(len(logs), size=(DRAWS, len(logs)))
    with np.errstate(invalid="ignore"):  # the mean of -inf and +inf: one side as often ahead as the other, a ratio of 1
        medians = np.nan_to_num(np.median(logs[draws], axis=1), nan=0.0, posinf=math.inf, neginf=-math.inf)
        middle = float(np.nan_to_num(np.median(logs), nan=0.0, posinf=math.inf, neginf=-math.inf))
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    middle, low, high = np.exp([middle, low, high]).tolist()
    return Estimate(middle, low, high, n=len(logs))
