"""Points of the unit cube that no result decides: quasi-random and independent ones. The first n of a design never change."""

from __future__ import annotations

import functools
from typing import TypeAlias

Unit: TypeAlias = "tuple[float, ...]"
"""A point of the unit cube."""
DESIGNS = ("sobol", "halton", "griswold")


@functools.cache
def design(method: str, points: int, dimensions: int, seed: int) -> tuple[Unit, ...]:
    """The first `points` of the design, one coordinate per dimension; none for a method that goes by results.

    `sobol`, `halton`: scrambled, so that each point alone is uniform and together they leave no gaps. `griswold`: the
    centre, then independent uniform points.
    """
    if method not in DESIGNS:
        return ()
    import numpy as np
    from scipy.stats import qmc  # takes a second, which recipes without a search are spared

    random = np.random.default_rng(seed)
    if method == "sobol":  # drawn to a power of 2, without which its balance is lost and scipy warns
        drawn = qmc.Sobol(dimensions, rng=random).random_base2((points - 1).bit_length())
    elif method == "halton":
        drawn = qmc.Halton(dimensions, rng=random).random(points)
    else:
        drawn = np.vstack([np.full((1, dimensions), 0.5), random.random((points - 1, dimensions))])
    return tuple(tuple(map(float, point)) for point in drawn[:points])
