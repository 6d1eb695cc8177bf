"""evidence.json: the trials behind every number of a report, by id; numbers of comparisons and predictions unrounded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.report.arm_pairs import comparisons
from orchestrator.report.arm_profiles import arm_profiles
from orchestrator.report.best_rates import listed
from orchestrator.report.noise_scales import noise_curves
from orchestrator.report.outlook import predicted
from orchestrator.report.search_table import searches
from orchestrator.report.summary import Cell, Summary
from orchestrator.report.tuning_budgets import budgets


def evidence(summary: Summary) -> str:
    """JSON: `cells` for medians, figures and the fits over an arm's cells, then a key per kind of number.

    null stands for what has no value or no end.
    """
    kinds: dict[str, Callable[[Summary], Sequence[Any]]] = {
        "noise_scale": noise_curves,
        "paired": comparisons,
        "profiles": arm_profiles,
        "budgets": budgets,
        "searches": searches,
        "best_rates": listed,
        "predictions": predicted,
    }
    found = {kind: [_plain(asdict(one)) for one in of(summary)] for kind, of in kinds.items()}
    return json.dumps({"cells": [_cell(cell) for cell in summary.all_cells], **found}, indent=1) + "\n"


def _cell(cell: Cell) -> dict[str, Any]:
    return {"arm": cell.arm, "batch": cell.batch, "setting": cell.setting, "trials": [t.trial for t in cell.trials]}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
