"""What `bigbatch predict` foresees of a study's arms, for its report, and why where it foresees nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mode

from orchestrator.batch_law.backtest import ENDS, REFUSED_BEYOND
from orchestrator.files import Damaged
from orchestrator.predict.calibrate import NOT_APART, Calibration, calibrate
from orchestrator.predict.forecast import NEAR_CHEAPEST, Forecast, Range, forecast, steps_ahead
from orchestrator.predict.hardware import DEFAULT, PRESETS
from orchestrator.predict.measured import measured
from orchestrator.predict.steps import Steps, steps_by
from orchestrator.predict.uncertainty import UP
from orchestrator.report.summary import Cell, Summary
from orchestrator.report.wording import figures2, goal, joined, plural

WORKERS = (1, 4, 16, 64)  # of the front of time and cost
POINTS = 16  # batch sizes along a predicted line


@dataclass(frozen=True)
class Outlook:
    arm: str
    steps: Steps
    batches: list[int]  # from the smallest at which the target was reached to REFUSED_BEYOND times the largest
    ahead: list[Range]  # steps to target at each
    calibration: Calibration | None  # None where step times tell too little

    @property
    def refused(self) -> float:
        """The batch size beyond which nothing is predicted."""
        return REFUSED_BEYOND * float(self.steps.reached[-1])


@dataclass(frozen=True)
class Outlooks:
    arms: list[Outlook]
    refusals: list[str]  # a line for each arm, or each part of one, that is not predicted


@lru_cache(maxsize=1)
def outlooks(summary: Summary) -> Outlooks:
    """Of the arms of a study with a target."""
    arms: list[Outlook] = []
    refusals: list[str] = []
    for arm in summary.cells if summary.target else ():
        try:
            steps = steps_by(summary.laws.get(arm), arm)
        except Damaged as refusal:
            refusals.append(f"No prediction for {refusal}.")
            continue
        batches = _along(steps.reached[0], REFUSED_BEYOND * steps.reached[-1])
        arms.append(Outlook(arm, steps, batches, steps_ahead(steps, batches), _calibration(summary, arm, refusals)))
    return Outlooks(arms, refusals)


def _along(first: float, last: float) -> list[int]:
    """Batch sizes evenly spaced in the logarithm, both ends among them."""
    return sorted({math.floor(first * (last / first) ** (i / POINTS) + 1e-6) for i in range(POINTS + 1)})


def _calibration(summary: Summary, arm: str, refusals: list[str]) -> Calibration | None:
    try:
        return calibrate(measured([summary], arm))
    except Damaged as refusal:
        told = str(refusal).removeprefix(f"{summary.study.path}: ")
        refusals.append(f"No prediction of times for {arm}: {told}.")
        return None


def workers_of(summary: Summary) -> int:
    """The number that most cells ran on."""
    return mode(map(_workers, summary.all_cells))


@lru_cache(maxsize=1)
def times_ahead(summary: Summary) -> dict[str, list[tuple[int, Range]]]:
    """By arm: batch size and seconds to target on as many workers as the study had, and their network."""
    known = [o for o in _timed(summary) if o.calibration and o.calibration.covers([workers_of(summary)], own=True)]
    return {o.arm: [(r.batch, r.seconds) for r in _forecast(summary, o).rows] for o in known}


def _timed(summary: Summary) -> list[Outlook]:
    return [one for one in outlooks(summary).arms if one.calibration]


def _forecast(summary: Summary, one: Outlook) -> Forecast:
    assert one.calibration
    workers = workers_of(summary)
    return forecast(one.steps, one.calibration, None, [workers], [b for b in one.batches if b >= workers])


@dataclass(frozen=True, slots=True)
class Predicted:
    """A point of the fan."""

    arm: str
    trials: tuple[str, ...]
    batch: int
    steps: Range
    seconds: Range | None


def predicted(summary: Summary) -> list[Predicted]:
    found = []
    for one in outlooks(summary).arms:
        trials = tuple(t.trial for cell in summary.cells[one.arm] for t in cell.trials)
        times = dict(times_ahead(summary).get(one.arm, []))
        rows = zip(one.batches, one.ahead, strict=True)
        found += [Predicted(one.arm, trials, batch, steps, times.get(batch)) for batch, steps in rows]
    return found


@lru_cache(maxsize=1)
def spreads(summary: Summary) -> dict[str, Forecast]:
    """By arm: batch sizes measured and beyond on WORKERS, over the network that `bigbatch predict` assumes by default."""
    return {
        one.arm: forecast(one.steps, one.calibration, PRESETS[DEFAULT], WORKERS, None)
        for one in _timed(summary)
        if one.calibration and one.calibration.covers(WORKERS, own=False)
    }


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of (time, cost): those that no other beats in both, by rising time."""
    best, found = math.inf, []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if points[i][1] < best:
            best = points[i][1]
            found.append(i)
    return found


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to reach the target."""

    workers: int
    batch: int
    seconds: Range
    optimum: bool = False  # fastest, cheapest, or the fastest of those nearly as cheap

    @property
    def cost(self) -> float:
        """Worker-seconds."""
        return self.workers * self.seconds.value


@lru_cache(maxsize=1)
def offers(summary: Summary) -> dict[str, list[Offer]]:
    """By arm: all of the forecasts or, where there are none, what was measured, if on more than one number of workers."""
    if found := spreads(summary):
        return {arm: _offered(forecast) for arm, forecast in found.items()}
    timed = [c for c in summary.all_cells if c.seconds and math.isfinite(c.seconds.median)]
    if len({_workers(cell) for cell in timed}) < 2:
        return {}
    return {arm: [_as_measured(c) for c in timed if c.arm == arm] for arm in dict.fromkeys(c.arm for c in timed)}


def _offered(forecast: Forecast) -> list[Offer]:
    best = list(forecast.optima.values())
    return [Offer(r.load.workers, r.batch, r.seconds, any(r is one for one in best)) for r in forecast.rows]


def _as_measured(cell: Cell) -> Offer:
    assert cell.seconds
    return Offer(_workers(cell), cell.batch, Range(cell.seconds.median, cell.seconds.low, cell.seconds.high))


def _workers(cell: Cell) -> int:
    return mode(t.workers or 1 for t in cell.trials)


def unsaid(summary: Summary) -> list[str]:
    """Why predictions are missing, a line for each; nothing in a study without a target."""
    if not (summary.target and summary.all_cells):
        return []
    lines = list(outlooks(summary).refusals)
    if mixed := [one.arm for one in _timed(summary) if one.arm not in spreads(summary)]:
        lines.append(f"No prediction of times on other workers or networks for {joined(mixed)}: {NOT_APART}.")
    if not offers(summary):
        lines.append(
            "No front of time and cost: none is predicted, and what was measured ran on "
            f"{plural(workers_of(summary), 'worker')}, so that cost follows time."
        )
    return lines


# ------------------------------------------------------------------------------------------------------------- captions


def fan_caption(summary: Summary) -> tuple[str, str]:
    assert summary.target
    found = outlooks(summary).arms
    bounds = [f"{one.arm} {figures2(one.steps.law.critical)}" for one in found if not one.steps.estimate.identified]
    taken = f" Not identified, so its bound is taken as B_crit: {joined(bounds)}." if bounds else ""
    errors = joined([f"x{math.exp(e):.2f} up to {far:g} times it" for e, far in zip(UP, ENDS[1:-1], strict=False)])
    timed = (
        f" Times: {plural(workers_of(summary), 'worker')}, on the hardware and network of the study."
        if times_ahead(summary)
        else ""
    )
    return "Predicted against measured", (
        f"What `bigbatch predict` foresees from this study to {goal(summary.target)}, with 95 % intervals, "
        f"and medians of what was measured. Beyond the largest batch size that reached the target, intervals are widened by "
        f"the errors found on published curves ({errors}); more than {REFUSED_BEYOND:g} times it, predictions miss by a "
        f"factor of three and are refused.{taken}{timed}"
    )


def cost_caption(summary: Summary) -> tuple[str, str]:
    assert summary.target
    title, lead = "Time against cost", f"Seconds and worker-seconds to {goal(summary.target)}"
    line = "Lines join what nothing beats in both; the shade along a point is its interval."
    if not spreads(summary):
        return title, f"{lead}, as measured: medians, a point per batch size and number of workers. {line}"
    command = f"bigbatch predict --workers {','.join(map(str, WORKERS))}"
    return title, (
        f"{lead}, as `{command}` foresees them from this study: batch sizes from the smallest measured to {REFUSED_BEYOND:g} "
        f"times the largest, step times as measured here, gradients over the network preset {DEFAULT}, more than one worker "
        f"uncalibrated. {line} Labels, workers x batch size: the fastest, the cheapest, and the fastest that costs at most "
        f"{NEAR_CHEAPEST:g} times the cheapest."
    )
