"""Which point of a cell is the best, and the seeds with which it is run again.

The best of many points on their own seeds is too good: some of its lead is luck. So a report takes none of its numbers
from the search, and the winner is trained anew with seeds that the search has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any, TypeAlias

from orchestrator.results import QUALITY

Result: TypeAlias = "dict[str, Any]"  # a result.json


def ranks(points: Sequence[Sequence[Result]]) -> list[tuple[float, float]]:
    """For each point, from its results over seeds: median steps to target, then the median of the final metric, the
    lower the better. What diverged or was given up is the last in both, save that a target reached is reached."""
    results = [result for point in points for result in point]
    metric = next((m for m in QUALITY if any(r["final"].get(m) is not None for r in results)), QUALITY[0])
    return [(median([steps(r) for r in point]), median([_loss(r, metric) for r in point])) for point in points]


def best(points: Sequence[Sequence[Result]]) -> int:
    """The first of the points with the lowest rank."""
    ranked = ranks(points)
    return ranked.index(min(ranked))


def steps(result: Result) -> float:
    """Optimizer steps to the target; +inf for a miss, or without a target."""
    target = result["target"]
    return float(target["step"]) if target and target["reached"] else math.inf


def _loss(result: Result, metric: str) -> float:
    value = result["final"].get(metric)
    if result["status"] != "done" or value is None:
        return math.inf
    return -value if metric.endswith("accuracy") else value


def fresh(seeds: Sequence[int], n: int) -> list[int]:
    """`n` seeds of training that the search does not use: those after its largest."""
    return [max(seeds) + 1 + i for i in range(n)]
