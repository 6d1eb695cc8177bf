"""What smaller tuning budgets would have found, from the points that the searches of a study tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from orchestrator.comparison.budget import band, expected_best
from orchestrator.report.load import Result, as_text
from orchestrator.report.summary import Summary, final_value, higher_is_better, steps_to_target
from orchestrator.report.wording import SOURCES, joined, metric_name, plural
from orchestrator.statistics import median

FEWEST = 3  # points, for a curve


@dataclass(frozen=True)
class Budget:
    """Of one arm at one batch size: the expected best of k random points out of those tried, for k = 1, 2, ..."""

    arm: str
    batch: int
    trials: tuple[tuple[str, ...], ...]  # by point
    given_up: int  # points that a rule of the search gave up
    worst: int  # points that missed the target, or diverged
    best: tuple[float, ...] | None  # None where points were given up: then only its range is known
    low: tuple[float, ...]
    high: tuple[float, ...]


@lru_cache(maxsize=1)
def budgets(summary: Summary) -> list[Budget]:
    """Of searches that drew their points without looking at results, with three points or more."""
    tuning = [r for r in summary.study.results if r.tuning and not r.failed and r.arm not in summary.study.adaptive]
    cells = dict.fromkeys((r.arm, r.batch) for r in tuning)
    found = [_budget(summary, [r for r in tuning if (r.arm, r.batch) == cell]) for cell in cells]
    return [budget for budget in found if budget]


def _budget(summary: Summary, results: Sequence[Result]) -> Budget | None:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(as_text(result.point), []).append(result)
    points = list(groups.values())
    if len(points) < FEWEST or not (summary.target or summary.metric):
        return None
    ids = tuple(tuple(t.trial for t in point) for point in points)
    given_up = sum(any(t.status == "pruned" for t in point) for point in points)
    head = (results[0].arm, results[0].batch, ids, given_up)
    return _in_steps(head, points) if summary.target else _in_metric(head, points, summary.metric or "")


Head = tuple[str, int, tuple[tuple[str, ...], ...], int]


def _in_steps(head: Head, points: Sequence[Sequence[Result]]) -> Budget | None:
    """Averages 1 / steps, which is 0 for a miss: misses have no average number of steps. None if all points missed.

    A point that was given up would have taken more steps than it ran, so its 1 / steps lies between 0 and 1 / those.
    """
    steps = np.array([median([steps_to_target(t) for t in point]) for point in points])
    if not np.isfinite(steps).any():
        return None
    least = np.array([median([_at_least(t) for t in point]) for point in points])
    slow, fast = (-1 / steps).tolist(), (-1 / least).tolist()
    with np.errstate(divide="ignore"):  # where every draw missed
        middle, low, high = (1 / np.abs(v) for v in (expected_best(slow), band(fast)[0], band(slow)[1]))
    return Budget(*head, int(np.isinf(steps).sum()), None if head[3] else _told(middle), _told(low), _told(high))


def _at_least(trial: Result) -> float:
    """Steps to target; for a trial that was given up, those that it ran."""
    return float(trial.steps or 1) if trial.status == "pruned" else steps_to_target(trial)


def _in_metric(head: Head, points: Sequence[Sequence[Result]], metric: str) -> Budget | None:
    """The median final metric of a point; one that diverged counts as the worst of those that did not."""
    sign = -1.0 if higher_is_better(metric) else 1.0
    values = np.array([sign * median([final_value(t, metric) for t in point]) for point in points])
    known = np.isfinite(values)
    if not known.any():
        return None
    filled = np.where(known, values, values[known].max()).tolist()
    low, high = np.sort([sign * edge for edge in band(filled)], axis=0)
    return Budget(*head, int((~known).sum()), _told(sign * expected_best(filled)), _told(low), _told(high))


def _told(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist())


def common(found: Sequence[Budget]) -> int:
    """The largest budget that all of them have."""
    return min(len(b.trials) for b in found)


def budgets_caption(summary: Summary) -> tuple[str, str]:
    found = budgets(summary)
    what = "steps to target" if summary.target else f"final {metric_name(summary.metric or '')}"
    counted = (
        " The average is taken of 1 / steps, in which a point that missed counts as 0."
        if summary.target
        else " A point that diverged counts as the worst of the others."
    )
    return "What a smaller tuning budget would have found", (
        f"The expected {what} of the best of k points drawn at random, without replacement, from those of the search, against "
        f"k; bands: 95 % bootstrap over points, too narrow where k nears the number of points.{counted}"
        f"{_given_up(summary, found)}{_adaptive(summary)} On the seeds of the search, so the values flatter; arms are to be "
        f"compared at equal k. A search none of whose points reached the target has no curve. {SOURCES}"
    )


def _given_up(summary: Summary, found: Sequence[Budget]) -> str:
    number = sum(b.given_up for b in found)
    if not number:
        return ""
    points = f"{plural(number, 'point')} {'was' if number == 1 else 'were'} given up"
    if not summary.target:
        return f" {points}, and counted as it stood then."
    return f" {points}: there only a band is drawn, from reaching the target right then to reaching it never."


def _adaptive(summary: Summary) -> str:
    arms = [arm for arm in summary.study.adaptive if arm in summary.study.arms]
    return (
        f" {joined(arms)} chose points by earlier results, so no random draw tells of smaller budgets." if arms else ""
    )
