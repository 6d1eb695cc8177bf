"""When factors and inverses are made anew: at intervals, or less and less often for a factor that no longer changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Refresh:
    """`eager`: steps at the start of a phase that all make everything anew; `tolerance`: see `next_interval`, 0: off."""

    factors_every: int
    inverses_every: int
    eager: int
    tolerance: float

    def factors(self, step: int) -> bool:
        return step < self.eager or step % self.factors_every == 0

    def inverses(self, step: int) -> bool:
        return step < self.eager or step % self.inverses_every == 0


def change(new: Tensor, old: Tensor) -> Tensor:
    """() |new - old| / |old|, by the Frobenius norm."""
    return (new - old).norm() / old.norm()


def next_interval(last: int, before: int, as_last: bool, as_before: bool) -> int:
    """Steps until a factor is made anew, from the last two intervals and whether it is still as it was at their beginnings.

    Osawa et al. 2020, arXiv 2002.06015, algorithm 2: intervals grow like Fibonacci's numbers while a factor stays, and are
    halved when it moves.
    """
    if not as_last:
        return max(1, last // 2)
    return last + before if as_before else last
