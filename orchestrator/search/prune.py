"""Giving up trials of a search that cannot win (exact), or that are not likely to (ASHA, median).

A trial is told at its start by when it must have reached what (`Deadline`), from the finished trials of its own cell: so
what is given up depends on results on file, and a study that was killed goes on as it would have.

Exact: let S be the fewest steps to target of the cell so far. A trial that has not reached the target at step S takes more
than S steps, so the cell's minimum is the same without it, whatever the order of trials. Nothing else about the trial is
known, it is censored at the step where it ended; the report's numbers come from winners, of which none is given up.

ASHA and median compare metrics at the same step, long before the end. Within a cell the same step means the same examples
seen. Where rates decay with the run, or runs differ in length, early ranks and final ranks differ: see `search_checks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

from orchestrator.recipe.search_schema import Asha, Median, Prune
from orchestrator.recipe.workload_schema import Target
from orchestrator.results import QUALITY, Deadline
from orchestrator.search.winners import Result, steps

Rows = Callable[[Result], "list[dict[str, Any]]"]


def deadlines(prune: Prune, target: Target | None, others: Sequence[Result], rows: Rows) -> tuple[Deadline, ...]:
    """What a trial of the search has to reach, given the finished trials of its cell (`others`)."""
    if prune.name == "none":
        return ()
    if prune.name == "exact":
        fewest = _fewest(others)
        return (Deadline(int(fewest), target),) if target and fewest < math.inf else ()
    metric = target.metric if target else _metric(others)
    curves = [_Curve(rows(result), metric, result["status"]) for result in others]
    rule = _rungs if prune.name == "asha" else _medians
    return tuple(Deadline(step, _as_target(metric, value)) for step, value in rule(prune.options, curves, metric))


def stands(prune: Prune, result: Result, others: Sequence[Result]) -> bool:
    """Whether a result on file, if it is one of a trial that was given up, is what `prune` would still leave it at."""
    if result["status"] != "pruned":
        return True
    if prune.name == "exact":
        return _fewest(others) <= result["steps"] and steps(result) == math.inf
    return result.get("pruned_by") == terms(prune, result)


def terms(prune: Prune, result: Result) -> dict[str, Any]:
    """What a heuristic's verdict rests on, kept with the result."""
    return {"rule": prune.model_dump(mode="json", exclude_none=True), "metric": (result["target"] or {}).get("metric")}


def _fewest(results: Sequence[Result]) -> float:
    return min((steps(r) for r in results if r["status"] == "done"), default=math.inf)


def _metric(results: Sequence[Result]) -> str:
    return next((m for m in QUALITY if any(r["final"].get(m) is not None for r in results)), QUALITY[0])


class _Curve:
    """The best value so far at each step where the metric was measured, the lower the better."""

    def __init__(self, rows: list[dict[str, Any]], metric: str, status: str):
        self.points, low = [], math.inf
        for row in (r for r in rows if r.get(metric) is not None):
            low = min(low, _signed(metric, row[metric]))
            self.points.append((row["step"], row["epoch"], low))
        self.end = {"done": low, "diverged": math.inf}.get(status)  # what it counts as after its last row

    def at(self, step: int) -> float | None:
        """At the last evaluation up to `step`; None before the first, and after a trial was given up."""
        if not self.points or self.points[-1][0] < step:
            return self.end
        return next((low for s, _, low in reversed(self.points) if s <= step), None)


def _rungs(asha: Asha, curves: list[_Curve], metric: str) -> Iterator[tuple[int, float]]:
    """At each rung, the value that 1 of `factor` trials has reached there."""
    rung, last = asha.grace, max((c.points[-1][1] for c in curves if c.points), default=0.0)
    while rung <= last:
        step = min(s for c in curves for s, epoch, _ in c.points if epoch >= rung)
        there = sorted(low for c in curves if (low := c.at(step)) is not None)
        allowed = (len(there) + 1) // asha.factor  # of these and the trial itself
        if allowed and there[allowed - 1] < math.inf:
            yield step, _signed(metric, there[allowed - 1])
        rung *= asha.factor


def _medians(rule: Median, curves: list[_Curve], metric: str) -> Iterator[tuple[int, float]]:
    """At each evaluation after `grace`, the median of the others there."""
    at = sorted({step for c in curves for step, epoch, _ in c.points if epoch >= rule.grace})
    for step in at:
        there = [low for c in curves if (low := c.at(step)) is not None]
        if len(there) >= rule.startup and (middle := median(there)) < math.inf:
            yield step, _signed(metric, middle)


def _signed(metric: str, value: float) -> float:
    """Lower is better; its own inverse."""
    return -value if metric.endswith("accuracy") else value


def _as_target(metric: str, value: float) -> Target:
    """Past the limits of a recipe's targets, which a value that was measured need not keep."""
    fields: dict[str, Any] = {metric: value}
    return Target.model_construct({metric}, **fields)
