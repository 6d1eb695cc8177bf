"""What a trial's rows amount to: final and best metrics, and where the target was first reached."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from orchestrator.recipe.workload_schema import Target

METRICS = ("test_", "train_")


def reached(target: Target, row: dict[str, Any]) -> bool:
    """Whether a row meets the target; a row without the metric does not."""
    value = row.get(target.metric)
    if value is None:
        return False
    return value >= target.value if target.higher_is_better else value <= target.value


def outcome(rows: Iterable[dict[str, Any]], target: Target | None, timed: bool = True) -> dict[str, Any]:
    """`final`, `best` and `target` of result.json, from the rows alone: a new target needs no new training.

    `timed` is false for rows of phases that were trained elsewhere: steps may be reused across machines, times never.
    """
    rows = list(rows)
    final: dict[str, float] = {}
    best: dict[str, float] = {}
    for name, value in ((k, v) for row in rows for k, v in row.items() if k.startswith(METRICS)):
        final[name] = value
        if value is not None:
            better = max if name.endswith("accuracy") else min
            best[name] = better(value, best.get(name, value))
    return {"final": final, "best": best, "target": target and _hit(rows, target, timed)}


def _hit(rows: list[dict[str, Any]], target: Target, timed: bool) -> dict[str, Any]:
    hit = next((row for row in rows if reached(target, row)), {})
    found = {name: hit.get(key) for name, key in _HIT.items()} | ({} if timed else {"seconds": None})
    return {"metric": target.metric, "value": target.value, "reached": bool(hit), **found}


_HIT = {"step": "step", "examples": "examples", "epochs": "epoch", "seconds": "seconds"}
