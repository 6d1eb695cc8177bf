"""The tables of a report as texts, for both the HTML page and the Markdown page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.report.load import Result, as_text
from orchestrator.report.summary import BATCH, Cell, Summary, flops_to_target, seconds_to_target, steps_to_target
from orchestrator.report.wording import count, figures3, metric_name, metric_value, span
from orchestrator.statistics import Estimate, over_perfect, regime, slopes, wilson

LONGEST = 160  # characters of an error in a table; the whole of it is in results.csv
WORDS = {"arm", "trial", "status", "best setting", "regime", "reused", "error", "role", "at an edge"}  # set flush left
WORDS |= {"chosen on", "remark", "comparison", "quantity", "test", "misses"}


@dataclass(frozen=True)
class Table:
    header: list[str]
    numeric: list[bool]  # columns set flush right
    rows: list[list[str]]

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> Table:
        """From rows that have the same keys. None is an empty cell; a column with nothing in it is dropped."""
        names = [n for n in (rows[0] if rows else ()) if any(row[n] not in (None, "") for row in rows)]
        numeric = [name not in WORDS for name in names]
        return cls(names, numeric, [["" if row[n] is None else str(row[n]) for n in names] for row in rows])


# ------------------------------------------------------------------------------------------------ per arm and batch size


def cells_table(summary: Summary) -> Table:
    """What the figures show, in numbers."""
    return Table.of([row for cells in summary.cells.values() for row in _arm_rows(summary, cells)])


def _arm_rows(summary: Summary, cells: list[Cell]) -> list[dict[str, Any]]:
    scaling = _scaling(cells) if summary.target else [{}] * len(cells)
    return [_cell_row(summary, cell) | more for cell, more in zip(cells, scaling, strict=True)]


def _cell_row(summary: Summary, cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": cell.arm, "batch": cell.batch, "seeds": len(cell.trials)}
    if summary.searched or summary.study.layerwise:
        tried = sum((r.arm, r.batch) == (cell.arm, cell.batch) for r in summary.study.results)
        row |= {"trials": tried, "settings tried": cell.settings, "best setting": setting(cell)}
    if summary.target:
        low, high = wilson(cell.hits, len(cell.trials))
        row |= {"reached": f"{cell.hits} of {len(cell.trials)}", "hit rate, 95 % interval": f"{low:.2f}-{high:.2f}"}
        row |= _with_interval(summary, "steps to target", cell.steps, count)
        row["seconds to target"] = figures3(cell.seconds.median) if cell.seconds else None
        row["FLOPs to target"] = figures3(cell.flops.median) if cell.flops else None
    if summary.metric:
        metric = summary.metric
        row |= _with_interval(summary, f"final {metric_name(metric)}", cell.final, lambda v: metric_value(metric, v))
    return row


def _with_interval(
    summary: Summary, name: str, estimate: Estimate | None, text: Callable[[float], str]
) -> dict[str, str | None]:
    interval = span(estimate, text) if estimate and estimate.n > 1 else None
    return {name: text(estimate.median) if estimate else None, f"{name}, {interval_kinds(summary)}": interval}


def interval_kinds(summary: Summary) -> str:
    """What the intervals of a study are, for a heading."""
    return " or ".join(sorted({cell.steps.kind for cell in summary.all_cells}, reverse=True))


def _scaling(cells: list[Cell]) -> list[dict[str, Any]]:
    """Against perfect scaling from the arm's first batch size that reached the target, and from one batch size to the next."""
    batches, steps = [c.batch for c in cells], [c.steps.median for c in cells]
    first = next((i for i, s in enumerate(steps) if math.isfinite(s)), len(steps))
    over = [math.nan] * first + (over_perfect(batches[first:], steps[first:]) if first < len(steps) else [])
    local = [math.nan] * (len(steps) > 0) + slopes(batches, steps)
    return [
        {
            "steps over perfect": f"{o:+.0%}".replace("%", " %") if math.isfinite(o) else None,
            "local slope": f"{s:.2f}" if math.isfinite(s) else None,
            "regime": regime(s) if math.isfinite(s) else None,
        }
        for o, s in zip(over, local, strict=True)
    ]


def setting(cell: Cell) -> str:
    return ", ".join(f"{path.removeprefix('base.')} {as_text(value)}" for path, value in cell.setting.items())


# ------------------------------------------------------------------------------------------------------------ per trial


def trials_table(summary: Summary) -> Table:
    paths = dict.fromkeys(path for r in summary.study.results for path in r.point if path != BATCH)
    return Table.of([_trial_row(r, list(paths), summary.metric) for r in summary.study.results])


def _trial_row(result: Result, paths: list[str], metric: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": result.trial, "arm": result.arm, "batch": result.batch}
    row |= {path.removeprefix("base."): as_text(result.point[path]) if path in result.point else None for path in paths}
    row |= {
        "role": result.role if result.role != "grid" else None,
        "seed": result.seed,
        "status": result.status,
        "steps": result.steps,
        "epochs": _number(result.epochs, count),
    }
    if metric:
        name = metric_name(metric)
        row |= {f"final {name}": _metric(metric, result.final), f"best {name}": _metric(metric, result.best)}
    row |= {"steps to target": count(steps_to_target(result)) if result.target else None}
    row |= {"seconds to target": figures3(seconds_to_target(result)) if result.target else None}
    row |= {"FLOPs to target": figures3(flops_to_target(result)) if result.target and result.flops else None}
    row |= {"training FLOPs": _number(result.flops, figures3)}
    row |= {"training seconds": _number(result.seconds.get("train"), figures3)}
    row |= {"examples per second": _number(result.examples_per_second, figures3)}
    return row | {"reused": "yes" if result.reused else None, "error": (result.error or "")[:LONGEST]}


def _number(value: float | None, text: Callable[[float], str]) -> str | None:
    return None if value is None else text(value)


def _metric(name: str, values: dict[str, float | None]) -> str | None:
    return _number(values.get(name), lambda value: metric_value(name, value))
