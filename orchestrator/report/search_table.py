"""What the searches of a study cost and found, apart from the results that they led to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.report.load import Result, as_text
from orchestrator.report.summary import Cell, Summary, final_value, steps_to_target
from orchestrator.report.tables import Table
from orchestrator.report.wording import count, metric_name, metric_value
from orchestrator.statistics import median


@dataclass(frozen=True)
class Searched:
    """The search of one arm at one batch size."""

    arm: str
    batch: int
    trials: tuple[str, ...]  # failed ones included
    chosen: tuple[str, ...]  # those of its best point; none without a winner


def searches(summary: Summary) -> list[Searched]:
    return [
        Searched(arm, batch, _ids(tuning), _ids(_chosen(tuning, _winners(summary, arm, batch))))
        for (arm, batch), tuning in _by_cell(summary).items()
    ]


def search_table(summary: Summary) -> Table:
    """A row per arm and batch size: the budget of the search, and its best point then and on fresh seeds."""
    return Table.of([_row(summary, arm, batch, tuning) for (arm, batch), tuning in _by_cell(summary).items()])


def _by_cell(summary: Summary) -> dict[tuple[str, int], list[Result]]:
    """The trials of each search, by arm and batch size."""
    found: dict[tuple[str, int], list[Result]] = {}
    for result in (r for r in summary.study.results if r.tuning):
        found.setdefault((result.arm, result.batch), []).append(result)
    return found


def _winners(summary: Summary, arm: str, batch: int) -> Cell | None:
    return next((c for c in summary.cells.get(arm, []) if c.batch == batch and c.fresh), None)


def _chosen(tuning: Sequence[Result], winners: Cell | None) -> list[Result]:
    return [r for r in tuning if winners and r.point == winners.trials[0].point]


def _ids(results: Sequence[Result]) -> tuple[str, ...]:
    return tuple(r.trial for r in results)


def _row(summary: Summary, arm: str, batch: int, tuning: Sequence[Result]) -> dict[str, Any]:
    """The best point in the search is told by what it was chosen by, the median over the seeds of the search."""
    winners = _winners(summary, arm, batch)
    best = [r for r in _chosen(tuning, winners) if not r.failed]
    row: dict[str, Any] = {"arm": arm, "batch": batch, "points": len({as_text(r.point) for r in tuning})}
    row |= {status: sum(r.status == status for r in tuning) or None for status in ("diverged", "pruned", "failed")}
    row |= {"steps trained": sum(r.steps or 0 for r in tuning)}
    if summary.target:
        row["best in the search, steps"] = count(median([steps_to_target(r) for r in best])) if best else None
        row["on fresh seeds, steps"] = count(winners.steps.median) if winners else None
    elif metric := summary.metric:
        name, values = metric_name(metric), [final_value(r, metric) for r in best]
        row[f"best in the search, {name}"] = metric_value(metric, median(values)) if values else None
        row[f"on fresh seeds, {name}"] = (
            metric_value(metric, winners.final.median) if winners and winners.final else None
        )
    return row | {"at an edge": winners.trials[0].edge if winners else None}
