"""Performance profiles (Dolan and More 2002), and their score as the AlgoPerf benchmark takes it (Dahl et al. 2023).

Each arm's time to target on each workload is set against the best of the arms there: r = t / best, a miss being infinite. The
profile rho(tau) is the fraction of workloads with r <= tau; the score is its average over tau from 1 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LIMIT = 4.0  # times the best, at which AlgoPerf gives up


def ratios(times: Array) -> Array:
    """`times` (arms, workloads), > 0, inf for a miss -> r of the same shape; inf for all where every arm missed."""
    best = times.min(axis=0)
    return np.divide(times, best, out=np.full(times.shape, np.inf), where=np.isfinite(times) & np.isfinite(best))


def profile(ratios: Array, taus: Sequence[float]) -> Array:
    """(arms, taus): the fraction of the workloads that each arm solves within tau of the best."""
    return np.asarray((ratios[:, :, None] <= np.array(taus)).mean(axis=1))


def score(ratios: Array, limit: float = LIMIT) -> Array:
    """(arms,): the integral of the profile from 1 to `limit`, over limit - 1; exact. 1: the best everywhere."""
    return np.asarray(np.maximum(limit - ratios, 0.0).mean(axis=1) / (limit - 1))


def mean_ratio(ratios: Array) -> tuple[Array, int]:
    """(arms,) geometric means of r over the workloads that all arms solved, and the number of these."""
    solved = np.isfinite(ratios).all(axis=0)
    logs = np.log(ratios[:, solved])
    return (np.exp(logs.mean(axis=1)) if solved.any() else np.full(len(ratios), np.nan)), int(solved.sum())
