"""Which example stands where: the trial's endless stream of examples, and how a batch is shared out.

Position p of the stream belongs to epoch p // n and is entry p % n of that epoch's permutation, a pure function of
(seed, epoch). Global batch t is positions [t * batch, (t + 1) * batch): every batch is full, and may cross the end of
an epoch. Workers take contiguous shares of a batch, so the order does not depend on their number.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from strategies.contract import mix


def indices(seed: int, start: int, stop: int, n: int) -> NDArray[np.int64]:
    """(stop - start,) places in a data set of `n` examples, for stream positions [start, stop)."""
    pieces = [np.empty(0, np.int64)]
    for epoch in range(start // n, -(-stop // n)):
        first = epoch * n
        pieces.append(_permutation(seed, epoch, n)[max(start - first, 0) : stop - first])
    return np.concatenate(pieces)


@lru_cache(maxsize=2)  # a batch that crosses the end of an epoch needs both
def _permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64(mix(seed, "order", epoch))).permutation(n)


def share(start: int, stop: int, rank: int, size: int) -> tuple[int, int]:
    """The part of [start, stop) that worker `rank` of `size` takes; parts differ by one example at most."""
    length = stop - start
    return start + length * rank // size, start + length * (rank + 1) // size


def micro(start: int, stop: int, limit: int) -> list[tuple[int, int]]:
    """[start, stop) in as few pieces of at most `limit` examples as can be, which differ by one example at most."""
    pieces = -(-(stop - start) // limit)
    return [share(start, stop, i, pieces) for i in range(pieces)]
