"""Which rank inverts which layer, and which ranks hold the inverse (Pauloski et al. 2021, arXiv 2107.01739).

Ranks form a grid of g rows and size / g columns. A layer belongs to a column: its g ranks, the layer's gradient workers, hold
the inverse; one of them, the owner, holds the factors and inverts. Each row has one gradient worker of every layer, from which
the others of the row receive the preconditioned gradient. With g = size only inverses travel; with g = 1 only gradients do,
and each rank holds least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from strategies.contract import PlanError


@dataclass(frozen=True, slots=True)
class Placement:
    size: int  # ranks
    columns: int
    owners: tuple[int, ...]  # by layer

    def column(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the inverses of the same layers as `rank`."""
        return tuple(range(rank % self.columns, self.size, self.columns))

    def row(self, rank: int) -> tuple[int, ...]:
        """The ranks among which preconditioned gradients are exchanged."""
        first = rank - rank % self.columns
        return tuple(range(first, first + self.columns))

    def owned(self, rank: int) -> list[int]:
        """The layers that `rank` inverts."""
        return [layer for layer, owner in enumerate(self.owners) if owner == rank]

    def held(self, rank: int) -> list[int]:
        """The layers whose inverses `rank` holds."""
        return [layer for layer, owner in enumerate(self.owners) if owner % self.columns == rank % self.columns]


def place(costs: Sequence[float], size: int, fraction: float) -> Placement:
    """Layers on ranks: the dearest first, each to the column, and in it to the rank, with the least to do so far.

    `fraction` of the ranks, at least one, are gradient workers of a layer. Raises PlanError if their number does not divide
    that of all ranks.
    """
    workers = max(1, round(size * fraction))
    if size % workers:
        raise PlanError(
            f"natural_gradient: gradient_workers {fraction:g} of {size} workers is {workers}, which does not divide {size}"
        )
    columns = size // workers
    load, owners = [0.0] * size, [0] * len(costs)
    for layer in sorted(range(len(costs)), key=lambda i: -costs[i]):
        column = min(range(columns), key=lambda c: sum(load[c::columns]))
        owners[layer] = min(range(column, size, columns), key=lambda rank: load[rank])
        load[owners[layer]] += costs[layer]
    return Placement(size, columns, tuple(owners))
