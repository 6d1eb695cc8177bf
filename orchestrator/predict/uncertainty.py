"""By how much forecasts miss, on a log scale: what was found when measured points were forecast from others."""

from __future__ import annotations

import math

from orchestrator.batch_law.backtest import ENDS

# 90th percentile of |ln(predicted / measured)| over ten published curves, for each class of distance that ends at ENDS[1:]
UP = (0.17, 0.28, 0.65, 1.6)
DOWN = (0.17, 0.21, 0.39, 0.45)
PER_FOURFOLD = math.log(1.5)  # of the workers, where nothing was measured to compare with: a choice, not a measurement


def law_error(batch: float, smallest: float, largest: float) -> float:
    """Of steps to target at a batch size outside [smallest, largest] that the law was fitted to; 0 inside."""
    distance = max(batch / largest, smallest / batch)
    if distance <= 1:
        return 0.0
    return (UP if batch > largest else DOWN)[next(i for i, end in enumerate(ENDS[1:]) if distance <= end)]


def scale_error(workers: int, measured: int) -> float:
    """Of a step's time on more workers than were measured on the network in question; 0 up to there."""
    return PER_FOURFOLD * math.log(max(1.0, workers / measured), 4)
