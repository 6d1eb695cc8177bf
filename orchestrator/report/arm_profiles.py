"""Performance profiles of the arms of a study: how often each is near the fastest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from orchestrator.comparison.profiles import LIMIT, Array, mean_ratio, ratios, score
from orchestrator.report.load import Result
from orchestrator.report.summary import Summary, steps_to_target
from orchestrator.report.tables import Table
from orchestrator.report.wording import SOURCES, batches, goal, plural

PROFILES_NOTE = (
    f"Score: the average share of workloads solved within tau times the fastest arm, for tau from 1 to {LIMIT:g}; 1 is the "
    f"fastest everywhere, and a miss counts as infinitely slow. {SOURCES}"
)


@dataclass(frozen=True)
class Profile:
    """An arm over the workloads that all arms have: a batch size and a seed each."""

    arm: str
    trials: tuple[str, ...]  # one per workload
    reached: int
    in_steps: tuple[float, ...]  # times the steps of the fastest arm, by workload; inf for a miss
    in_examples: tuple[float, ...]
    score: float  # in steps
    score_examples: float
    mean_ratio: float  # geometric, over the workloads that all arms solved; NaN without one
    solved: int  # of these


@lru_cache(maxsize=1)
def arm_profiles(summary: Summary) -> list[Profile]:
    """None without a target, a second arm, or a workload that all arms have. Arms without a result do not take part."""
    arms, shared = _by_workload(summary), _workloads(summary)
    if not summary.target or len(arms) < 2 or not shared:
        return []
    trials = [[of[workload] for workload in shared] for of in arms.values()]
    steps, examples = _ratios(trials, steps_to_target), _ratios(trials, _examples_to_target)
    means, solved = mean_ratio(steps)
    ids = [tuple(t.trial for t in own) for own in trials]
    reached = np.isfinite(steps).sum(axis=1).tolist()
    columns = (score(steps).tolist(), score(examples).tolist(), means.tolist())
    return [
        Profile(arm, own, n, tuple(s), tuple(e), by_steps, by_examples, mean, solved)
        for arm, own, n, s, e, by_steps, by_examples, mean in zip(
            arms, ids, reached, steps.tolist(), examples.tolist(), *columns, strict=True
        )
    ]


def _by_workload(summary: Summary) -> dict[str, dict[tuple[int, int], Result]]:
    """The trials of each arm by batch size and seed."""
    arms = {arm: [(c, t) for c in cells for t in c.trials] for arm, cells in summary.cells.items() if cells}
    return {arm: {(c.batch, t.seed): t for c, t in own} for arm, own in arms.items()}


def _workloads(summary: Summary) -> list[tuple[int, int]]:
    """Those that all arms have."""
    arms = _by_workload(summary).values()
    return sorted(set.intersection(*map(set, arms))) if arms else []


def _ratios(trials: list[list[Result]], time: Callable[[Result], float]) -> Array:
    return ratios(np.array([[time(t) for t in own] for own in trials]))


def _examples_to_target(trial: Result) -> float:
    """They follow the steps, save where the batch grows in training."""
    steps, target = steps_to_target(trial), trial.target
    return float(target.examples) if math.isfinite(steps) and target and target.examples else steps * trial.batch


def examples_differ(summary: Summary) -> bool:
    """Whether counting examples gives another profile than counting steps."""
    return any(not np.allclose(p.in_steps, p.in_examples) for p in arm_profiles(summary))


def profiles_table(summary: Summary) -> Table:
    return Table.of([_row(summary, p) for p in arm_profiles(summary)])


def _row(summary: Summary, p: Profile) -> dict[str, Any]:
    ratio = f"{p.mean_ratio:.2f}" if math.isfinite(p.mean_ratio) else None
    return {
        "arm": p.arm,
        "workloads": len(p.trials),
        "reached": p.reached,
        "score, steps": f"{p.score:.3f}",
        "score, examples": f"{p.score_examples:.3f}" if examples_differ(summary) else None,
        f"steps over the fastest, where all reached ({plural(p.solved, 'workload')})": ratio,
    }


def profiles_caption(summary: Summary) -> tuple[str, str]:
    assert summary.target
    profiles = arm_profiles(summary)
    alike = (
        ""
        if examples_differ(summary)
        else " In examples seen the profile is the same: arms are compared at equal batch sizes."
    )
    nobody = sum(all(math.isinf(r) for r in at) for at in zip(*(p.in_steps for p in profiles), strict=True))
    lost = f" {plural(nobody, 'workload')} that no arm solved {'count' if nobody > 1 else 'counts'} against all." * (
        nobody > 0
    )
    alone = [b for b in summary.batches if b not in {batch for batch, _ in _workloads(summary)}]
    apart = f" Left out: {batches(alone)}, without a seed that all arms have there." if alone else ""
    return "Performance profiles", (
        f"The share of {plural(len(profiles[0].trials), 'workload')}, a batch size and a seed each, on which an arm reaches "
        f"{goal(summary.target)} in at most tau times the steps of the fastest arm there; a miss is infinitely slow."
        f"{lost}{apart} The score in the legend is the average height from tau = 1 to {LIMIT:g}; it is relative to the arms of "
        f"this study, and workloads that share a batch size are not independent.{alike}"
    )
