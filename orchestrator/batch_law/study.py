"""The curves of a study, one per arm, each batch size at its best setting of what else the grid varied."""

from __future__ import annotations

from pathlib import Path

from orchestrator.batch_law.curve import Curve
from orchestrator.files import Damaged
from orchestrator.report.load import load
from orchestrator.report.summary import summarise


def curves(path: Path) -> list[Curve]:
    """Raises Damaged if there is no such study, or none with a target."""
    try:
        summary = summarise(load(path, None))
    except FileNotFoundError as error:
        raise Damaged(str(error)) from None
    if summary.target is None:
        raise Damaged(f"{path}: this study has no target, so there are no steps to target to fit")
    return [Curve(arm, summary.points(arm)) for arm in summary.cells]
