"""The gradient noise scale of a study's trials, where they measured it, beside the critical batch size that was fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from orchestrator.comparison.noise import FEWEST, Ratio, Series, Stretch, along, whole
from orchestrator.report.load import Result, Study
from orchestrator.report.summary import Cell, Summary
from orchestrator.report.tables import Table
from orchestrator.report.wording import SOURCES, figures2, figures3
from orchestrator.statistics import median
from strategies.parts.gradient_noise import SATURATION, saturated

NOISE_NOTE = (
    "Noise scales in examples, with 95 % intervals in brackets; first and last are the first and last stretch of the figure. "
    f"The noise scale is shown beside the critical batch size fitted to steps to target, never instead of it. {SOURCES}"
)


@dataclass(frozen=True)
class NoiseCurve:
    """Of one arm at one batch size, all of its trials together; noise scales in examples."""

    arm: str
    batch: int
    trials: tuple[str, ...]
    whole: Ratio
    stretches: tuple[Stretch, ...]
    at_target: Stretch | None  # in which the median trial reached the target
    saturated: bool  # so large for this data set that it is too low


@lru_cache(maxsize=1)
def noise_curves(summary: Summary) -> list[NoiseCurve]:
    """Of the arms and batch sizes whose rows hold `train_noise_trace` and `train_noise_signal`."""
    found = [_curve(summary.study, cell) for cell in summary.all_cells]
    return [curve for curve in found if curve]


def _curve(study: Study, cell: Cell) -> NoiseCurve | None:
    measured = {t.trial: series for t in cell.trials if (series := _series(study, t))}
    if not measured:
        return None
    trials = list(measured.values())
    run, stretches = whole(trials), tuple(along(trials))
    reached = median([_examples_to_target(t) for t in cell.trials])
    there = next((s for s in stretches if s.first < reached <= s.last), None)
    sizes = [t.examples / t.epochs for t in cell.trials if t.examples and t.epochs]
    high = bool(sizes) and math.isfinite(run.value) and saturated(run.value, round(sizes[0]))
    return NoiseCurve(cell.arm, cell.batch, tuple(measured), run, stretches, there, high)


def _series(study: Study, trial: Result) -> Series | None:
    """Rows hold averages since the row before, so each counts by the examples between."""
    names = ("train_noise_trace", "train_noise_signal", "examples")
    rows = [r for r in study.rows(trial) if all(r.get(name) is not None for name in names)]
    if not rows:
        return None
    trace, signal, examples = (np.array([r[name] for r in rows], dtype=float) for name in names)
    return Series(trace, signal, np.diff(examples, prepend=0.0), examples)


def _examples_to_target(trial: Result) -> float:
    target = trial.target
    return float(target.examples) if target and target.reached and target.examples else math.inf


# ------------------------------------------------------------------------------------------------------ table and words


def noise_table(summary: Summary) -> Table:
    return Table.of([_row(summary, curve) for curve in noise_curves(summary)])


def _row(summary: Summary, curve: NoiseCurve) -> dict[str, Any]:
    return {
        "arm": curve.arm,
        "batch": curve.batch,
        "trials": len(curve.trials),
        "rows": curve.whole.rows,
        "noise scale, whole run": scale(curve.whole.value),
        "95 % interval": interval(curve.whole),
        "first stretch": _with_interval(curve.stretches[0].scale),
        "at the target": _with_interval(curve.at_target.scale) if curve.at_target else None,
        "last stretch": _with_interval(curve.stretches[-1].scale),
        "fitted critical batch": critical(summary, curve.arm),
        "remark": f"above {SATURATION:.0%} of the data set: too low".replace("%", " %") if curve.saturated else None,
    }


def scale(value: float) -> str:
    return "no signal found" if math.isinf(value) else figures3(value)


def interval(found: Ratio) -> str | None:
    if math.isinf(found.low):
        return "no signal found"
    if math.isfinite(found.high):
        return f"{figures3(found.low)}-{figures3(found.high)}"
    return f"at least {figures3(found.low)}" if found.low > 0 else None


def _with_interval(found: Ratio) -> str:
    ends = interval(found)
    return f"{scale(found.value)} [{ends}]" if ends and math.isfinite(found.value) else scale(found.value)


def critical(summary: Summary, arm: str) -> str | None:
    """As the law of this arm has it: a value with its interval, a bound, or nothing."""
    law = summary.laws.get(arm)
    if law is None:
        return None
    if law.identified:
        ends = law.quoted["critical"]
        return f"{figures2(law.fit.law.critical)} [{figures2(ends.low)}-{figures2(ends.high)}]"
    return f"{law.bound[0]} {figures2(law.bound[1])}" if law.bound else None


def noise_caption(summary: Summary) -> tuple[str, str]:
    curves = noise_curves(summary)
    fitted = [c.arm for c in curves if (law := summary.laws.get(c.arm)) and law.identified]
    line = (
        "Dashed: the critical batch size fitted to the steps to target of the same arm, with its interval; it is shown beside "
        "the noise scale, and neither stands for the other."
        if fitted
        else "No critical batch size was identified from steps to target to show beside it, and the noise scale is no "
        "substitute for one."
    )
    return "Gradient noise scale against examples seen", (
        "B_simple = tr(Sigma) / |G|^2: the ratio of the averages of both over a stretch of examples and all trials of an arm "
        "and batch size, never an average of ratios. Bands: 95 % intervals from blocks of neighbouring rows, without upper "
        f"end where the signal may be zero or there are fewer than {FEWEST} rows. It is a proxy, from the gradient alone: "
        f"expect it to agree with a critical batch size within a factor of two or three. {line}"
    )
