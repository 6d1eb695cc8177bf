"""What a trial's rows amount to: final and best metrics, and where the target was first reached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.recipe.workload_schema import Target

METRICS = ("test_", "train_")
QUALITY = ("test_accuracy", "test_loss", "train_loss")  # of the final quality, the first that was measured


@dataclass(frozen=True, slots=True)
class Deadline:
    """A trial that has not reached `target` at its first row from `step` on is given up: it ends as `pruned`."""

    step: int
    target: Target


def reached(target: Target, row: dict[str, Any]) -> bool:
    """Whether a row meets the target; a row without the metric does not."""
    value = row.get(target.metric)
    if value is None:
        return False
    return value >= target.value if target.higher_is_better else value <= target.value


def unmet(deadlines: Iterable[Deadline], rows: Iterable[dict[str, Any]]) -> list[Deadline]:
    """The deadlines whose target none of the rows has reached, on time or late."""
    rows = list(rows)
    return [deadline for deadline in deadlines if not any(reached(deadline.target, row) for row in rows)]


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


_HIT = {"step": "step", "examples": "examples", "epochs": "epoch", "flops": "flops", "seconds": "seconds"}
