"""Time and cost to target for batch sizes and numbers of workers: steps from the law times seconds from the model of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.batch_law.backtest import REFUSED_BEYOND
from orchestrator.batch_law.censored import Array
from orchestrator.files import Damaged
from orchestrator.predict.calibrate import DRAWS, NOT_APART, Calibration
from orchestrator.predict.hardware import OWN, Hardware
from orchestrator.predict.step_time import Compute, Load, step_seconds
from orchestrator.predict.steps import TAILS, Steps
from orchestrator.predict.uncertainty import law_error, scale_error

NEAR_CHEAPEST = 1.2


@dataclass(frozen=True, slots=True)
class Range:
    value: float
    low: float  # of the 95 % interval
    high: float

    def times(self, factor: float) -> Range:
        return Range(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Row:
    batch: int
    load: Load
    steps: Range
    step_seconds: Range
    seconds: Range  # to target
    statistical: float  # examples to target at the smallest batch size measured, over those here
    hardware: float | None  # throughput of a worker over that of one alone at the same local batch, if that is known
    uncalibrated: bool  # more workers than were measured on this network

    @property
    def device_hours(self) -> Range:
        return self.seconds.times(self.load.workers / 3600)

    @property
    def speed_up(self) -> float | None:
        """Over one worker at the same local batch, were it to need no more examples than the smallest batch size."""
        return None if self.hardware is None else self.load.workers * self.statistical * self.hardware


@dataclass(frozen=True)
class Forecast:
    steps: Steps
    calibration: Calibration
    hardware: Hardware
    on_own: bool  # the network is the one that the studies ran on
    rows: Sequence[Row]

    @property
    def optima(self) -> dict[str, Row]:
        """Fastest, cheapest, and the fastest that costs at most 1.2 times the cheapest; by the values, not the intervals."""
        cheapest = min(self.rows, key=lambda r: r.device_hours.value)
        near = [r for r in self.rows if r.device_hours.value <= NEAR_CHEAPEST * cheapest.device_hours.value]

        def fast(rows: Iterable[Row]) -> Row:
            return min(rows, key=lambda r: r.seconds.value)

        return {"fastest": fast(self.rows), "cheapest": cheapest, "fastest within 1.2x of cheapest": fast(near)}


def default_batches(measured: Sequence[float]) -> list[int]:
    """The batch sizes measured, and on from the largest by doubling, as far as predictions hold."""
    beyond = [measured[-1] * 2**i for i in range(1, round(math.log2(REFUSED_BEYOND)) + 1)]
    return [int(b) for b in (*measured, *beyond)]


def forecast(
    steps: Steps,
    calibration: Calibration,
    hardware: Hardware | None,
    workers: Sequence[int],
    batches: Sequence[int] | None,
    force: bool = False,
) -> Forecast:
    """A row per number of workers and batch size of at least that many examples. `hardware` None: the studies' own.

    Raises Damaged beyond REFUSED_BEYOND times the largest batch size measured, unless `force`, and where the time of a step
    cannot be told.
    """
    if not calibration.covers(workers, own=hardware is None):
        own = ",".join(map(str, sorted(calibration.workers)))
        raise Damaged(
            f"{calibration.measured.where}: arm {calibration.measured.arm}: {NOT_APART}: add a study on 1 worker, or ask for "
            f"--workers {own} --hardware {OWN}"
        )
    wanted = sorted(set(batches)) if batches else default_batches(steps.reached.tolist())
    largest = steps.reached[-1]
    if wanted[-1] > REFUSED_BEYOND * largest and not force:
        raise Damaged(
            f"batch size {wanted[-1]} is more than {REFUSED_BEYOND:g} times the largest at which the target was reached "
            f"({largest:g}); from there on, predictions miss by a factor of three: --force makes them"
        )
    pairs = [(n, b) for n in sorted(set(workers)) for b in wanted if b >= n]
    if not pairs:
        raise Damaged(f"no batch size of {wanted[-1]} or less has an example for each of {min(workers)} workers")
    maker = _Maker(steps, calibration, hardware, wanted)
    rows = [maker.row(n, b) for n, b in pairs]
    return Forecast(steps, calibration, hardware or calibration.own, hardware is None, rows)


def steps_ahead(steps: Steps, batches: Sequence[int]) -> list[Range]:
    """Steps to target at each batch size, with the interval of a forecast's rows; for where no step was timed."""
    log_steps = steps.draws(batches, DRAWS)
    noise = np.random.default_rng(1).standard_normal(DRAWS)
    return [_steps(steps, b, logs, noise) for b, logs in zip(batches, log_steps.T, strict=True)]


def _steps(steps: Steps, batch: int, logs: Array, noise: Array) -> Range:
    """From draws of the law's ln S: the scatter about it and the error of predictions beyond it are added."""
    widen = law_error(batch, steps.reached[0], steps.reached[-1])
    return _range(steps.law.steps(batch), logs + steps.scatter * noise, widen)


class _Maker:
    """What all rows share: draws of the law and of the step time, paired, and the scatter about both."""

    def __init__(
        self, steps: Steps, calibration: Calibration, hardware: Hardware | None, batches: Sequence[int]
    ) -> None:
        self.steps, self.calibration, self.hardware = steps, calibration, hardware
        count = len(calibration.draws)
        log_steps = steps.draws(batches, count)
        self.log_steps = dict(zip(batches, log_steps.T, strict=True))
        self.noise = np.random.default_rng(1).standard_normal((2, count))

    def row(self, workers: int, batch: int) -> Row:
        load = _load(workers, batch, self.calibration.measured.largest_micro_batch)
        law, reached = self.steps.law, self.steps.reached
        structural = law_error(batch, reached[0], reached[-1])
        log_s = self.log_steps[batch] + self.steps.scatter * self.noise[0]
        log_t, unknown = self._log_step(load)
        s, t = law.steps(batch), self._step(load, self.calibration.compute, self.calibration.own)
        alone = self._step(Load(1, load.local_batch, load.passes), self.calibration.compute, self.calibration.own)
        return Row(
            batch=batch,
            load=load,
            steps=_steps(self.steps, batch, self.log_steps[batch], self.noise[0]),
            step_seconds=_range(t, log_t, unknown),
            seconds=_range(s * t, log_s + log_t, structural + unknown),
            statistical=law.examples(reached[0]) / law.examples(batch),
            hardware=alone / t if self.calibration.told_apart else None,
            uncalibrated=unknown > 0,
        )

    def _log_step(self, load: Load) -> tuple[Array, float]:
        """Draws of the log of a step's time, and how far off it may be besides."""
        draws = [self._step(load, compute, own) for compute, own in self.calibration.draws]
        measured = self.calibration.most_workers if self.hardware is None else 1
        beyond = scale_error(load.workers, measured)
        unknown = max(beyond, self.calibration.backtest or 0.0) if beyond else 0.0
        return np.log(draws) + self.calibration.scatter * self.noise[1], unknown

    def _step(self, load: Load, compute: Compute, own: Hardware) -> float:
        return step_seconds(compute, self.hardware or own, self.calibration.measured.gradient, load)


def _load(workers: int, batch: int, largest: float) -> Load:
    """Micro-batches no larger than the largest that was measured: that it fits into memory is known."""
    share = -(-batch // workers)
    return Load(workers, share, math.ceil(share / largest))


def _range(value: float, logs: Array, widen: float) -> Range:
    """The 95 % interval of the draws, made wider by the factor exp(widen) on both sides; it holds the value."""
    low, high = np.exp(np.quantile(logs, TAILS)).tolist()
    return Range(value, min(low, value) * math.exp(-widen), max(high, value) * math.exp(widen))
