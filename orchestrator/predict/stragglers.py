"""How much later than the mean the last of many workers is done."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy.special import log_ndtr

from orchestrator.batch_law.censored import Array

GRID = np.linspace(-12.0, 14.0, 13_001)  # standard deviations: beyond its ends nothing of 1e12 workers is left out
LOG_DENSITY = -0.5 * GRID**2 - 0.5 * np.log(2 * np.pi)


def expected_largest(workers: int, value: Callable[[Array], Array] = np.asarray) -> float:
    """E[max of value(z_1) .. value(z_p)] for independent standard normal z and a rising `value`; by default of z itself.

    The largest z has the density p phi(z) Phi(z)^(p - 1); it falls off so fast that the sum over a grid is exact to 1e-12.
    """
    density = workers * np.exp(LOG_DENSITY + (workers - 1) * log_ndtr(GRID))
    return float((density * value(GRID)).sum() * (GRID[1] - GRID[0]))


@lru_cache
def delay(workers: int) -> float:
    """Standard deviations by which the slowest of `workers` exceeds their mean; 0 for one."""
    return expected_largest(workers) if workers > 1 else 0.0
