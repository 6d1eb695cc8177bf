"""What a smaller tuning budget would have found: the expected best of k points out of the K that were tried."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from orchestrator.statistics import LEVEL

Array = NDArray[np.float64]
DRAWS = 1000  # of the bootstrap


def weights(points: int) -> Array:
    """(K, K): row k - 1 holds the chance that the i-th best of K points is the best of k drawn without replacement,
    C(K - i, k - 1) / C(K, k)."""
    k, i = np.arange(1, points + 1)[:, None], np.arange(1, points + 1)
    left = np.maximum(points - i - k + 1, 0)
    logs = gammaln(points - i + 1) - gammaln(left + 1) - gammaln(k)
    logs = logs - gammaln(points + 1) + gammaln(k + 1) + gammaln(points - k + 1)
    return np.where(points - i >= k - 1, np.exp(logs), 0.0)


def expected_best(values: Sequence[float]) -> Array:
    """(K,): the expected lowest of k values, k = 1 to K. Values are finite, the lower the better."""
    return np.asarray(weights(len(values)) @ np.sort(np.asarray(values, dtype=float)))


def band(values: Sequence[float]) -> tuple[Array, Array]:
    """(K,) each: the 95 % percentile bootstrap of `expected_best` over the points, the same for the same values.

    At k near K it rests on the few best points and is too narrow: no resample holds a better point than those found.
    """
    found = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(len(found), size=(DRAWS, len(found)))
    curves = np.sort(found[picks], axis=1) @ weights(len(found)).T
    low, high = np.quantile(curves, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high
