"""What a forecast rests on, each input with where it is from: measured, preset, stated or assumed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.predict.calibrate import NOT_APART
from orchestrator.predict.forecast import Forecast
from orchestrator.predict.hardware import PRESETS, Hardware
from orchestrator.predict.step_time import BACKWARD, BUCKET, FIRST_BUCKET, MIB, bucket_sizes
from orchestrator.predict.uncertainty import PER_FOURFOLD, UP
from orchestrator.report.wording import figures3, joined, plural
from orchestrator.statistics import LEVEL


@dataclass(frozen=True, slots=True)
class Input:
    name: str
    value: str
    source: str


def inputs(forecast: Forecast) -> list[Input]:
    return [*_law(forecast), *_step(forecast), *_network(forecast), *_rest(forecast)]


def _law(forecast: Forecast) -> Iterator[Input]:
    steps = forecast.steps
    law, found, reached = steps.law, steps.estimate, steps.reached
    span = f"{len(reached)} batch sizes from {reached[0]:g} to {reached[-1]:g}"
    minimum = figures3(law.steps_min)
    if found.identified:
        interval = found.quoted["critical"]
        critical = f"{figures3(law.critical)} [{figures3(interval.low)}, {figures3(interval.high)}]"
        yield Input("law of steps", f"S_min {minimum}, B_crit {critical}, from {span}", "measured")
    else:
        word = found.bound[0] if found.bound else "about"
        why = "; ".join(found.reasons)
        value = f"B_crit {word} {figures3(law.critical)}, taken as that, S_min {minimum}; not identified: {why}; from {span}"
        yield Input("law of steps", value, "measured bound")
    within = [f"x{math.exp(e):.2f} to {far}x" for e, far in zip(UP[:3], (2, 4, 16), strict=True)]
    yield Input("error of the law beyond", ", ".join(within), "backtested on published curves")


def _step(forecast: Forecast) -> Iterator[Input]:
    calibration = forecast.calibration
    measured, compute = calibration.measured, calibration.compute
    sizes = sorted({cell.load.micro_batch for cell in measured.cells})
    trials, workers = sum(len(c.trials) for c in measured.cells), sorted({c.load.workers for c in measured.cells})
    traffic = "" if calibration.told_apart else ", traffic included"
    by = joined([plural(n, "worker") for n in workers])
    few = "; two only: a line through two points, which nothing checks" if len(sizes) == 2 else ""
    yield Input("device", f"{measured.device}, {measured.precision}, the same at every number of workers", "measured")
    yield Input(
        "a pass over a micro-batch",
        f"{_milli(compute.per_pass)} + {_milli(compute.per_example)} per example{traffic}, "
        f"scatter {100 * calibration.scatter:.1f} %; {plural(trials, 'trial')} on {by}, "
        f"{len(sizes)} micro-batch sizes from {sizes[0]:g} to {sizes[-1]:g}{few}",
        "measured",
    )
    own = "per_step" in calibration.fitted
    value = _milli(compute.per_step) if own else "0, counted with the passes: no trial accumulated, or all did alike"
    yield Input("optimizer, per step", value, "measured" if own else "assumed")
    yield Input("largest micro-batch", f"{sizes[-1]:g} examples; more are accumulated", "measured")


def _network(forecast: Forecast) -> Iterator[Input]:
    hardware, calibration = forecast.hardware, forecast.calibration
    yield from _links(forecast) if calibration.told_apart else _included()
    jitter = f"{100 * hardware.jitter:g} % of a worker's step, Gaussian"
    yield Input("jitter", jitter, _source(hardware) if "jitter" in hardware.model_fields_set else "assumed")
    if calibration.backtest is not None:
        value = f"x{math.exp(calibration.backtest):.2f}, from the fewest workers to the others"
        yield Input("error of the step time", value, "backtested on this study")
    if any(row.uncalibrated for row in forecast.rows):
        known = calibration.most_workers if forecast.on_own else 1
        value = (
            f"uncalibrated beyond {plural(known, 'worker')}: x{math.exp(PER_FOURFOLD):g} per fourfold number of them"
        )
        yield Input("error of scaling", value, "assumed")


def _included() -> Iterator[Input]:
    value = f"in the steps measured: {NOT_APART}; where passes are accumulated, between once a step and once a pass"
    yield Input("traffic", value, "assumed")


def _source(hardware: Hardware) -> str:
    return "preset" if hardware.name in PRESETS and hardware == PRESETS[hardware.name] else "stated"


def _links(forecast: Forecast) -> Iterator[Input]:
    hardware, calibration = forecast.hardware, forecast.calibration
    source = _source(hardware)
    fitted = forecast.on_own and "seconds_per_byte" in calibration.fitted
    link = hardware.network
    yield Input(f"{hardware.name}: latency", f"{link.latency * 1e6:g} us", "preset" if forecast.on_own else source)
    bandwidth = "measured, given the latency" if fitted else "preset" if forecast.on_own else source
    yield Input(f"{hardware.name}: bandwidth", f"{link.bandwidth / 1e9:.4g} GB/s", bandwidth)
    if hardware.node:
        node = hardware.node
        value = f"{node.workers} workers, {node.latency * 1e6:g} us, {node.bandwidth / 1e9:.4g} GB/s"
        yield Input(f"{hardware.name}: node", value, source)
    yield Input("all-reduce", hardware.algorithm.replace("_", "-"), "preset" if forecast.on_own else source)
    if hardware.reduction:
        yield Input("reduction", f"{hardware.reduction:g} s per byte", source)


def _overlap(forecast: Forecast) -> Iterator[Input]:
    """Of traffic with computing."""
    measured, fitted = forecast.calibration.measured, forecast.calibration.fitted
    buckets = len(bucket_sizes(measured.gradient))
    yield Input(
        "gradient", f"{measured.gradient / MIB:.4g} MiB in {plural(buckets, 'bucket')}, not compressed", "measured"
    )
    yield Input("bucket sizes", f"{FIRST_BUCKET // MIB} MiB, then {BUCKET // MIB} MiB", "assumed")
    yield Input("buckets are ready", "over the backward pass, in proportion to their bytes", "assumed")
    yield Input("backward pass", f"{BACKWARD:.2g} of a pass", "assumed")
    slow = "slowdown" in fitted
    value = f"{100 * forecast.calibration.compute.slowdown:.2g} %"
    yield Input("slow-down while gradients travel", value, "measured" if slow else "assumed")


def _rest(forecast: Forecast) -> Iterator[Input]:
    if forecast.calibration.told_apart:
        yield from _overlap(forecast)
    price = forecast.hardware.price
    yield Input(
        "price of a worker's hour", "not stated" if price is None else f"{price:g}", "-" if price is None else "stated"
    )
    yield Input("evaluation, start-up", "not counted", "assumed")
    yield Input("intervals", f"{100 * LEVEL:g} %, then widened by the errors above", "-")


def _milli(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds > 1e-9 else "0 ms"  # what a fit leaves of nothing
