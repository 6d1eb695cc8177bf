"""The trials of a study as points of curves, one curve per arm at its best setting of what else the grid varied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from orchestrator.batch_law.curve import Curve
from orchestrator.batch_law.law import Point
from orchestrator.files import Damaged
from orchestrator.report.load import Result, Study, load
from orchestrator.report.summary import Cell, steps_to_target, summarise
from orchestrator.store import Store


def curves(path: Path) -> list[Curve]:
    """Raises Damaged if there is no such study, or none with a target."""
    try:
        summary = summarise(load(path, None))
    except FileNotFoundError as error:
        raise Damaged(str(error)) from None
    if summary.target is None:
        raise Damaged(f"{path}: this study has no target, so there are no steps to target to fit")
    return [Curve(arm, points(summary.study, cells)) for arm, cells in summary.cells.items()]


def points(study: Study, cells: Sequence[Cell]) -> list[Point]:
    return [_point(study, trial) for cell in cells for trial in cell.trials]


def _point(study: Study, trial: Result) -> Point:
    """A hit lies after the evaluation before it; a miss, of whatever kind, after its last evaluation."""
    steps = steps_to_target(trial)
    metric = trial.target.metric if trial.target else ""
    evaluated = [row["step"] for row in Store(study.path).rows(trial.trial) if row.get(metric) is not None]
    if math.isinf(steps):
        return Point(trial.batch, float(max(evaluated, default=trial.steps or 0)), math.inf)
    before = max((step for step in evaluated if step < steps), default=0 if evaluated else steps)
    return Point(trial.batch, float(before), steps)
