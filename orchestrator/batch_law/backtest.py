"""How far the law may be trusted beyond the batch sizes that it was fitted to: measured points predicted from the others.

The smallest batch sizes of a curve, three or more, are fitted and each larger one is predicted; then the
same from the largest down.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from orchestrator.batch_law.fit import Locations, fit

REFUSED_BEYOND = 16.0  # times the largest batch size fitted: predictions miss by a factor of three there, in the median
FEWEST = 3  # batch sizes that a prediction rests on
ENDS = (1.0, 2.0, 4.0, REFUSED_BEYOND, np.inf)  # of the classes of distance


@dataclass(frozen=True, slots=True)
class Prediction:
    up: bool  # beyond the largest batch size fitted; else below the smallest
    distance: float  # from there, a factor above 1
    error: float  # ln(predicted / measured)
    reaches_half: bool  # the largest batch size fitted is at least half the critical one found


@dataclass(frozen=True, slots=True)
class Row:
    """Predictions over more than `nearest` and up to `farthest` times the distance."""

    up: bool
    nearest: float
    farthest: float
    pairs: int
    median: float  # of |error|
    ninetieth: float  # percentile of |error|
    signed: float  # median of the error


def predictions(at: Locations) -> list[Prediction]:
    """Of one curve whose locations are all exact, both ways."""
    k = len(at.batches)
    up = (_predict(at, slice(0, n), range(n, k), True) for n in range(FEWEST, k))
    down = (_predict(at, slice(k - n, k), range(k - n), False) for n in range(FEWEST, k))
    return [one for some in (*up, *down) for one in some]


def _predict(at: Locations, known: slice, unknown: Iterable[int], up: bool) -> list[Prediction]:
    batches = at.batches[known]
    law = fit(Locations(batches, at.lower[known], at.upper[known])).law
    half, edge = bool(batches[-1] >= law.critical / 2), batches[-1] if up else batches[0]
    ratios = ((at.batches[i], float(np.log(law.steps(at.batches[i])) - at.upper[i])) for i in unknown)
    return [Prediction(up, float(max(b / edge, edge / b)), error, half) for b, error in ratios]


def table(found: Sequence[Prediction]) -> list[Row]:
    """Errors by direction and distance; classes without predictions are left out."""
    rows = []
    for up in (True, False):
        for nearest, farthest in pairwise(ENDS):
            errors = np.array([p.error for p in found if p.up == up and nearest < p.distance <= farthest])
            if len(errors):
                middle, far = np.quantile(np.abs(errors), [0.5, 0.9]).tolist()
                rows.append(Row(up, nearest, farthest, len(errors), middle, far, float(np.median(errors))))
    return rows
