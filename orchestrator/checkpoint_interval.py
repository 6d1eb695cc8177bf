"""When the next checkpoint is due: every so many seconds, or as often as pays off (Young and Daly). Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHARE = 0.03  # of the training time that saving may take at most, under `auto`
THROUGHPUT = 100e6  # bytes per second: what a disk is trusted with before the first save was timed
OVERHEAD = 0.01  # seconds of the smallest save, likewise


def best_interval(cost: float, mtbf: float) -> float:
    """Seconds of work between saves of `cost` seconds that lose least time, saving and lost work together (Young/Daly)."""
    return math.sqrt(2 * cost * mtbf)


def expected_cost(size: int) -> float:
    """Seconds that a first checkpoint of `size` bytes is taken to need."""
    return OVERHEAD + size / THROUGHPUT


@dataclass(frozen=True, slots=True)
class CheckpointInterval:
    """`seconds` of training between checkpoints; None: `best_interval`, with saving held to `SHARE` of training."""

    seconds: float | None
    mtbf: float  # seconds from one failure of the trial's workers to the next

    def due(self, since: float, trained: float, spent: float, cost: float) -> bool:
        """All in seconds: `since` of training since the last save, `trained` in all, `spent` on saves, `cost` of the next."""
        if self.seconds is not None:
            return since >= self.seconds
        return since >= best_interval(cost, self.mtbf) and spent + cost <= SHARE * trained
