"""What synthesisers have yet to learn from, where the gradient comes some batches after the guess."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from strategies.contract import Worker
from strategies.decoupled import shares

if TYPE_CHECKING:
    from torch import Tensor


class Pair(NamedTuple):
    """Some examples at a cut: activations, labels, and the gradient of the summed loss by these activations."""

    h: Tensor
    y: Tensor
    target: Tensor


class Waiting:
    """This worker's share of each batch that waits, oldest first: a list of micro-batches for each cut."""

    def __init__(self, worker: Worker, cuts: int):
        self.worker, self.cuts = worker, cuts
        self.batches: deque[tuple[int, list[list[Pair]]]] = deque()  # with the size of the global batch
        self.fresh: list[list[Pair]] = [[] for _ in range(cuts)]

    def add(self, cut: int, pair: Pair) -> None:
        """A micro-batch of the batch that has just come."""
        self.fresh[cut].append(Pair(*(t.contiguous() for t in pair)))  # a checkpoint keeps no other layout

    def due(self, length: int, batch: int) -> Iterator[tuple[int, Pair, int]]:
        """The batch that has just come, of `batch` examples, goes in; what is more than `length` comes out: cut, micro-batch,
        size of its batch."""
        self.batches.append((batch, self.fresh))
        self.fresh = [[] for _ in range(self.cuts)]
        while len(self.batches) > length:
            size, cuts = self.batches.popleft()
            yield from ((cut, pair, size) for cut, pairs in enumerate(cuts) for pair in pairs)

    def whole(self) -> list[Any]:
        """All workers' shares as one, alike on every rank."""
        return [
            (size, [shares.whole([pair._asdict() for pair in pairs], size, self.worker) for pairs in cuts])
            for size, cuts in self.batches
        ]

    def restore(self, saved: list[Any]) -> None:
        """This worker's share of what was `whole`."""
        self.batches = deque(
            (size, [[Pair(**micro) for micro in shares.own(wholes, self.worker)] for wholes in cuts])
            for size, cuts in saved
        )
