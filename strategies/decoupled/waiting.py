"""What synthesisers have yet to learn from, where the gradient comes some batches after the guess."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from strategies.contract import Pending, Worker
from strategies.decoupled import shares

if TYPE_CHECKING:
    from torch import Tensor


class Pair(NamedTuple):
    """Some examples at a cut: activations, labels, and the gradient of the summed loss by these activations."""

    h: Tensor
    y: Tensor
    target: Tensor


Arrive: TypeAlias = Callable[[], None]
"""Until a pair's target is there."""


def at_once() -> None:
    """It is."""


@dataclass(slots=True)
class Arrival:
    """Of a target that is being received: once it is there, `then` does what is left to do."""

    pending: Pending | None
    then: Callable[[], None] | None

    def wait(self) -> None:
        if self.pending:
            self.pending.wait()
            self.pending = None

    def __call__(self) -> None:
        self.wait()
        if self.then:
            self.then()
            self.then = None


class Waiting:
    """This worker's share of each batch that waits, oldest first: a list of micro-batches for each cut.

    held: the cuts whose synthesisers are this worker's. everyone: all workers, where `worker` stands for those of one role.
    """

    def __init__(self, worker: Worker, cuts: int, held: Sequence[int], everyone: Worker | None = None):
        self.worker, self.cuts, self.held, self.everyone = worker, cuts, held, everyone
        self.batches: deque[tuple[int, list[list[tuple[Pair, Arrive]]]]] = deque()  # with the size of the global batch
        self.fresh: list[list[tuple[Pair, Arrive]]] = [[] for _ in range(cuts)]

    def add(self, cut: int, pair: Pair, arrive: Arrive = at_once) -> None:
        """A micro-batch of the batch that has just come."""
        self.fresh[cut].append((pair, arrive))

    def due(self, length: int, batch: int) -> Iterator[tuple[int, Pair, int]]:
        """The batch that has just come, of `batch` examples, goes in; what is more than `length` comes out: cut, micro-batch,
        size of its batch."""
        self.batches.append((batch, self.fresh))
        self.fresh = [[] for _ in range(self.cuts)]
        while len(self.batches) > length:
            size, cuts = self.batches.popleft()
            for cut in self.held:
                for pair, arrive in cuts[cut]:
                    arrive()
                    yield cut, pair, size

    def arrive(self) -> None:
        """Until all targets are there."""
        for _, cuts in self.batches:
            for _, arrive in (entry for entries in cuts for entry in entries):
                arrive()

    def whole(self) -> list[Any]:
        """All workers' shares as one, alike on every rank; they have arrived."""
        return [(size, [self._whole(size, cut, entries) for cut, entries in enumerate(cuts)])
                for size, cuts in self.batches]  # fmt: skip

    def _whole(self, size: int, cut: int, entries: list[tuple[Pair, Arrive]]) -> dict[str, Tensor]:
        micros = [pair._asdict() for pair, _ in entries]
        return shares.whole(micros, size, self.worker, self.everyone, None if cut in self.held else ())

    def restore(self, saved: list[Any]) -> None:
        """This worker's share of what was `whole`."""
        self.batches = deque((size, [self._own(wholes) for wholes in cuts]) for size, cuts in saved)

    def _own(self, wholes: dict[str, Tensor]) -> list[tuple[Pair, Arrive]]:
        return [(Pair(**micro), at_once) for micro in shares.own(wholes, self.worker)]
