"""Results grouped as one asks for them: per arm and batch size, over seeds, at the best setting of what else varied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from orchestrator.batch_law import intervals
from orchestrator.batch_law.law import Point
from orchestrator.report.load import Result, Study, Target, as_text
from orchestrator.results import QUALITY
from orchestrator.statistics import Estimate, estimate, median

BATCH = "base.batch"  # the grid path that is the batch size itself


def higher_is_better(metric: str) -> bool:
    return metric.endswith("accuracy")


def steps_to_target(result: Result) -> float:
    """Optimizer steps; +inf for a miss."""
    target = result.target
    return float(target.step) if target and target.reached and target.step is not None else math.inf


def seconds_to_target(result: Result) -> float:
    """Seconds of training; +inf for a miss."""
    target = result.target
    return target.seconds if target and target.reached and target.seconds is not None else math.inf


def flops_to_target(result: Result) -> float:
    """Floating-point operations of training; +inf for a miss."""
    target = result.target
    return target.flops if target and target.reached and target.flops is not None else math.inf


def final_value(result: Result, metric: str) -> float:
    """The metric at the end; the worst there is for a trial that diverged."""
    value = None if result.diverged else result.final.get(metric)
    worst = -math.inf if higher_is_better(metric) else math.inf
    return worst if value is None else value


@dataclass(frozen=True)
class Cell:
    """Trials of one arm at one batch size that differ in the seed only."""

    arm: str
    batch: int
    trials: tuple[Result, ...]  # at least one, none of them failed
    metric: str | None
    settings: int = 1  # of the other grid values, or of a search, this being the best
    chosen_here: int = 1  # settings among which these very seeds chose: of a grid all, of searches one winner each

    @property
    def fresh(self) -> bool:
        """Whether a search found its setting, with other seeds than these."""
        return self.trials[0].role == "winner"

    @property
    def unbiased(self) -> bool:
        """Whether other seeds alone chose its setting: of several searches, these seeds chose among the winners."""
        return self.fresh and self.chosen_here == 1

    @property
    def hits(self) -> int:
        return sum(math.isfinite(steps_to_target(t)) for t in self.trials)

    @property
    def diverged(self) -> int:
        return sum(t.diverged for t in self.trials)

    @cached_property
    def steps(self) -> Estimate:
        """Steps to target; all +inf in a study without one."""
        return estimate([steps_to_target(t) for t in self.trials])

    @cached_property
    def seconds(self) -> Estimate | None:
        """Training time to target of the trials that this study ran itself: times of reused ones come from elsewhere."""
        fresh = [seconds_to_target(t) for t in self.trials if not t.reused]
        return estimate(fresh) if fresh else None

    @cached_property
    def flops(self) -> Estimate | None:
        """FLOPs to target of the trials that counted them."""
        counted = [flops_to_target(t) for t in self.trials if t.flops is not None]
        return estimate(counted) if counted else None

    @cached_property
    def final(self) -> Estimate | None:
        return estimate([final_value(t, self.metric) for t in self.trials]) if self.metric else None

    @property
    def setting(self) -> dict[str, Any]:
        """Grid values besides the batch size."""
        return other_values(self.trials[0])

    @property
    def rank(self) -> tuple[float, float]:
        """Lower is better: median steps to target, then the median of the final metric."""
        if self.metric is None:
            return self.steps.median, 0.0
        values = [final_value(t, self.metric) for t in self.trials]
        return self.steps.median, median([-v for v in values] if higher_is_better(self.metric) else values)


@dataclass(frozen=True, eq=False)  # told apart by identity, so that what is worked out of one can be kept
class Summary:
    study: Study
    target: Target | None
    metric: str | None  # of the final quality
    cells: dict[str, list[Cell]]  # arm -> by growing batch size; an arm whose trials all failed has none

    @property
    def batches(self) -> list[int]:
        return sorted({cell.batch for cells in self.cells.values() for cell in cells})

    @property
    def all_cells(self) -> list[Cell]:
        return [cell for cells in self.cells.values() for cell in cells]

    def points(self, arm: str) -> list[Point]:
        """The trials of an arm as the law of the critical batch size takes them."""
        return [_point(self.study, trial) for cell in self.cells[arm] for trial in cell.trials]

    @cached_property
    def laws(self) -> dict[str, intervals.Estimate]:
        """Of the arms that reached the target at enough batch sizes to ask for one, if only for a bound."""
        found = {arm: intervals.estimate(self.points(arm)) for arm in self.cells}
        return {arm: law for arm, law in found.items() if law}

    @cached_property
    def workloads(self) -> list[dict[str, Any]]:
        """Of each cell, as its first trial was configured."""
        return [self.study.config(cell.trials[0]).get("workload") or {} for cell in self.all_cells]

    @property
    def stops(self) -> bool:
        """Whether trials end when they reach the target: then what they end at says little."""
        return any((workload.get("target") or {}).get("stop") for workload in self.workloads)

    @property
    def searched(self) -> bool:
        """Whether settings besides the batch size were tried."""
        return any(cell.settings > 1 for cell in self.all_cells)


def summarise(study: Study) -> Summary:
    usable = [r for r in study.results if not r.failed]
    target = next((r.target for r in study.results if r.target), None)
    metric = next((m for m in QUALITY if any(r.final.get(m) is not None for r in usable)), None)
    cells = {arm: _cells([r for r in usable if r.arm == arm], metric) for arm in study.arms}
    cells |= {arm: [_tuned(cell, usable) for cell in own] for arm, own in cells.items()}
    return Summary(study, target, metric, cells)


def _point(study: Study, trial: Result) -> Point:
    """A hit lies after the evaluation before it; a miss, of whatever kind, after its last evaluation."""
    steps, evaluated = steps_to_target(trial), study.evaluated(trial)
    if math.isinf(steps):
        return Point(trial.batch, float(max(evaluated, default=trial.steps or 0)), math.inf)
    before = max((step for step in evaluated if step < steps), default=0 if evaluated else steps)
    return Point(trial.batch, float(before), steps)


def other_values(result: Result) -> dict[str, Any]:
    return {path: value for path, value in result.point.items() if path != BATCH}


def _cells(results: Sequence[Result], metric: str | None) -> list[Cell]:
    """Of one arm: the best setting at each batch size."""
    told = [r for r in results if not r.tuning]  # the search chose among the others: they flatter
    return [_best([r for r in told if r.batch == b], metric) for b in sorted({r.batch for r in told})]


def _tuned(cell: Cell, results: Sequence[Result]) -> Cell:
    """With the number of points that a search tried for it."""
    points = {as_text(r.point) for r in results if r.tuning and (r.arm, r.batch) == (cell.arm, cell.batch)}
    return replace(cell, settings=len(points)) if cell.fresh else cell


def _best(results: Sequence[Result], metric: str | None) -> Cell:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(as_text(other_values(result)), []).append(result)
    cells = [Cell(g[0].arm, g[0].batch, tuple(g), metric, len(groups), len(groups)) for g in groups.values()]
    return min(cells, key=lambda cell: cell.rank)
