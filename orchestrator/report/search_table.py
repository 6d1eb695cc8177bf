"""What the searches of a study cost and found, apart from the results that they led to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from orchestrator.report.load import Result, as_text
from orchestrator.report.summary import Summary, steps_to_target
from orchestrator.report.tables import Table
from orchestrator.report.wording import count, metric_name, metric_value


def search_table(summary: Summary) -> Table:
    """A row per arm and batch size: the budget of the search, and its best point then and on fresh seeds."""
    tuning = [r for r in summary.study.results if r.tuning]
    cells = dict.fromkeys((r.arm, r.batch) for r in tuning)
    return Table.of(
        [_row(summary, arm, batch, [r for r in tuning if (r.arm, r.batch) == (arm, batch)]) for arm, batch in cells]
    )


def _row(summary: Summary, arm: str, batch: int, tuning: Sequence[Result]) -> dict[str, Any]:
    winners = next((c for c in summary.cells.get(arm, []) if c.batch == batch and c.fresh), None)
    best = [r for r in tuning if winners and r.point == winners.trials[0].point]
    row: dict[str, Any] = {"arm": arm, "batch": batch, "points": len({as_text(r.point) for r in tuning})}
    row |= {status: sum(r.status == status for r in tuning) or None for status in ("diverged", "pruned", "failed")}
    row |= {"steps trained": sum(r.steps or 0 for r in tuning)}
    if summary.target:
        row["best in the search, steps"] = count(min(map(steps_to_target, best))) if best else None
        row["on fresh seeds, steps"] = count(winners.steps.median) if winners else None
    elif metric := summary.metric:
        values = [v for r in best if (v := r.final.get(metric)) is not None and math.isfinite(v)]
        name = metric_name(metric)
        row[f"best in the search, {name}"] = metric_value(metric, values[0]) if values else None
        row[f"on fresh seeds, {name}"] = (
            metric_value(metric, winners.final.median) if winners and winners.final else None
        )
    return row | {"at an edge": winners.trials[0].edge if winners else None}
