"""What studies say of the time of a step: trials of one arm, by workers, batch and micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.files import Damaged, printable
from orchestrator.predict.step_time import Load
from orchestrator.recipe.problems import nearest
from orchestrator.report.load import Result, Study, load
from orchestrator.report.summary import Summary, summarise

BYTES = {"fp64": 8}  # per gradient; all other precisions keep 4


@dataclass(frozen=True)
class Cell:
    """Trials that differ in the seed, or in what costs no time."""

    load: Load
    trials: tuple[float, ...]  # seconds per step of each

    @cached_property
    def seconds(self) -> float:
        return median(self.trials)


@dataclass(frozen=True)
class Measured:
    """One arm, on one kind of device."""

    where: str
    arm: str
    cells: tuple[Cell, ...]
    parameters: int
    device: str
    precision: str

    @property
    def gradient(self) -> int:
        """Bytes."""
        return self.parameters * BYTES.get(self.precision, 4)

    @property
    def largest_micro_batch(self) -> float:
        return max(cell.load.micro_batch for cell in self.cells)


def summaries(paths: Sequence[Path]) -> list[Summary]:
    """Studies with a target, each read once. Raises Damaged."""
    try:
        found = [summarise(load(path, None)) for path in paths]
    except FileNotFoundError as error:
        raise Damaged(str(error)) from None
    if found[0].target is None:
        raise Damaged(f"{paths[0]}: this study has no target, so there is no time to it to predict")
    return found


def chosen(found: Sequence[Summary], arm: str | None) -> list[str]:
    """The arm named, or all of the first study."""
    names = list(found[0].cells)
    if arm is not None and arm not in names:
        raise Damaged(f"{found[0].study.path}: no arm {printable(arm)!r}, {nearest(arm, names)}")
    return names if arm is None else [arm]


def measured(found: Sequence[Summary], arm: str) -> Measured:
    """Step times of the trials that the studies trained themselves. Raises Damaged if these do not belong together."""
    studies = [summary.study for summary in found]
    timed = [(study, result) for study in studies for result in study.results if result.arm == arm and _timed(result)]
    where = " + ".join(str(study.path) for study in studies)
    if not timed:
        raise Damaged(f"{where}: no trial of arm {arm!r} has a step time of its own")
    if any(result.roles > 1 for _, result in timed):
        raise Damaged(
            f"{where}: arm {arm!r} has modules on workers of their own, of whose step times there is no model"
        )
    for name in ("parameters", "device", "precision", "threads"):
        _same(where, arm, name, {repr(getattr(result, name)) for _, result in timed})
    _same(where, arm, "workload", {_workload(study, result) for study, result in timed})
    first = timed[0][1]
    assert first.parameters is not None
    cells: dict[Load, list[float]] = {}
    for _, result in timed:
        cells.setdefault(_load(result), []).append(_seconds(result))
    by_load = tuple(Cell(key, tuple(cells[key])) for key in sorted(cells, key=lambda k: (k.workers, k.local_batch)))
    return Measured(where, arm, by_load, first.parameters, first.device or "unknown", first.precision or "fp32")


def _timed(result: Result) -> bool:
    """Times of reused phases were measured elsewhere; a schedule of batch sizes has no step time of its own."""
    scheduled = result.examples != (result.steps or 0) * result.batch
    fresh = not (result.failed or result.reused or scheduled)
    return fresh and bool(result.examples_per_second and result.workers and result.parameters)


def _seconds(result: Result) -> float:
    return result.batch / (result.examples_per_second or 1.0)


def _load(result: Result) -> Load:
    workers = result.workers or 1
    share = -(-result.batch // workers)
    return Load(workers, share, -(-share // (result.micro_batch or share)))


def _same(where: str, arm: str, name: str, values: set[str]) -> None:
    if len(values) > 1:
        raise Damaged(
            f"{where}: arm {arm!r} has trials of different {name}: {printable(', '.join(sorted(values)))[:120]}"
        )


def _workload(study: Study, result: Result) -> str:
    """What a step computes; when the target is checked and what it is change none of it."""
    workload: dict[str, Any] = study.config(result).get("workload") or {}
    return repr(sorted((k, v) for k, v in workload.items() if k not in ("target", "evaluate")))
