"""Seconds to sum a vector over all ranks, by algorithm, from the latency of a message and the bandwidth of a link.

Textbook costs (Thakur, Rabenseifner and Gropp 2005; Chan et al. 2007). `size` is in bytes; one rank needs no time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

Cost = Callable[[float, int, "Wire"], float]  # (bytes, ranks, wire) -> seconds


@dataclass(frozen=True, slots=True)
class Wire:
    """What joins two ranks."""

    latency: float  # seconds per message
    bandwidth: float  # bytes per second, each way

    def send(self, size: float) -> float:
        return self.latency + size / self.bandwidth


def lower_bound(size: float, ranks: int, wire: Wire) -> float:
    """Each rank must send and receive 2 (p - 1) / p of the vector, whatever the algorithm."""
    return 2 * (ranks - 1) / ranks * size / wire.bandwidth


def ring(size: float, ranks: int, wire: Wire) -> float:
    """A reduce-scatter and an all-gather, each of p - 1 messages of one p-th."""
    return 2 * (ranks - 1) * wire.latency + lower_bound(size, ranks, wire)


def halving_doubling(size: float, ranks: int, wire: Wire) -> float:
    """Recursive halving, then doubling; ranks beyond a power of two hand their vector in and get the sum back."""
    power = 1 << (ranks.bit_length() - 1)
    outside = 2 * wire.send(size) if ranks > power else 0.0
    return 2 * math.log2(power) * wire.latency + lower_bound(size, power, wire) + outside


def tree(size: float, ranks: int, wire: Wire) -> float:
    """Pipelined double binary tree: up and down, both trees at once, so that each rank sends the vector twice at most."""
    return 2 * (math.ceil(math.log2(ranks)) * wire.latency + size / wire.bandwidth) if ranks > 1 else 0.0


@lru_cache
def _rows(ranks: int) -> int:
    """Of the squarest grid."""
    return next(y for y in range(math.isqrt(ranks), 0, -1) if ranks % y == 0)


def torus(size: float, ranks: int, wire: Wire) -> float:
    """Rings along the rows of the squarest grid, then along its columns with what each row has kept; a prime is one ring."""
    rows = _rows(ranks)
    return ring(size, ranks // rows, wire) + ring(size * rows / ranks, rows, wire)


def fastest(size: float, ranks: int, wire: Wire) -> float:
    """As a library chooses that knows ring, halving-doubling and tree."""
    return min(cost(size, ranks, wire) for cost in (ring, halving_doubling, tree))


def hierarchical(size: float, ranks: int, inner: Wire, per_node: int, outer: Wire) -> float:
    """Reduce-scatter in each node, `fastest` over the nodes with the part that each rank has kept, all-gather in each node.

    A last node that is not full takes as long as a full one.
    """
    together = min(per_node, ranks)
    return ring(size, together, inner) + fastest(size / together, math.ceil(ranks / together), outer)


FLAT: dict[str, Cost] = {
    "ring": ring,
    "halving_doubling": halving_doubling,
    "tree": tree,
    "torus": torus,
    "fastest": fastest,
}
