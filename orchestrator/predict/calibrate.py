"""The model of a step's time, fitted to what studies measured: local batch sizes, accumulation, numbers of workers.

Only trials on 1 worker show computing without traffic. Without them the steps measured count as computing, traffic and all:
that tells the time of a step on as many workers and their network, and nothing of any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares, nnls

from orchestrator.batch_law.censored import Array
from orchestrator.files import Damaged
from orchestrator.predict.hardware import OWN, PRESETS, Hardware, Link
from orchestrator.predict.measured import Cell, Measured
from orchestrator.predict.step_time import Compute, bucket_sizes, step_seconds

DRAWS = 200
ASSUMED_SCATTER = 0.05  # of step times on a log scale, where two points without repetition show none
NOT_APART = "no trial ran on 1 worker, so computing and traffic cannot be told apart"
FREE = Link.model_construct(latency=0.0, bandwidth=math.inf)  # past the limits of hardware files
INCLUDED = PRESETS[OWN].model_copy(update={"network": FREE})  # of steps that count as computing, traffic and all
FEWEST_FOR_SLOWDOWN = 3  # local batch sizes with traffic: bandwidth takes one, a slope of the slow-down two


@dataclass(frozen=True)
class Calibration:
    measured: Measured
    compute: Compute
    own: Hardware  # what the studies ran on
    fitted: tuple[str, ...]  # parameters that the studies determine
    scatter: float  # of one local batch size about the model, on the log scale
    draws: Sequence[tuple[Compute, Hardware]]
    backtest: float | None  # 90th percentile of |ln(predicted / measured)|: more workers, from a fit to the fewest

    @property
    def workers(self) -> set[int]:
        """Numbers of them that were measured."""
        return {cell.load.workers for cell in self.measured.cells}

    @property
    def most_workers(self) -> int:
        return max(self.workers)

    @property
    def told_apart(self) -> bool:
        """Whether computing is known without traffic."""
        return _told_apart(self.measured.cells)

    def covers(self, workers: Iterable[int], own: bool) -> bool:
        """Whether the time of a step can be told on each of these numbers of workers, over the studies' own network or not."""
        return self.told_apart or (own and self.workers.issuperset(workers))


def calibrate(measured: Measured) -> Calibration:
    """Raises Damaged with fewer than two local batch sizes."""
    cells = measured.cells
    if len({cell.load.micro_batch for cell in cells}) < 2:
        raise Damaged(f"{measured.where}: step times of one local batch size; two or more tell how they grow with it")
    fitted = _identified(cells, measured.gradient)
    theta, jacobian = _fit(cells, measured.gradient, fitted)
    compute, own = _model(cells, fitted, theta)
    scatter = _scatter(cells, compute, own, measured.gradient, len(theta))
    noise = np.random.default_rng(0).standard_normal((DRAWS, len(cells))) * scatter
    drawn = np.maximum(theta + noise @ np.linalg.pinv(jacobian).T, 0.0)  # one step of Gauss and Newton per draw
    draws = [(c, net) for c, net in (_model(cells, fitted, one) for one in drawn) if c.per_step + c.one_pass(1) > 0]
    if not (_told_apart(cells) or "per_step" in fitted):
        draws[1::2] = [(_once(c, cells), net) for c, net in draws[1::2]]
    return Calibration(measured, compute, own, fitted, scatter, draws, _backtest(measured))


def _told_apart(cells: Sequence[Cell]) -> bool:
    return any(cell.load.workers == 1 for cell in cells)


def _once(compute: Compute, cells: Sequence[Cell]) -> Compute:
    """The same step where what does not grow with the micro-batch, which may be traffic, comes once however many the passes."""
    return replace(compute, per_pass=0.0, per_step=max(cell.load.passes for cell in cells) * compute.per_pass)


def _identified(cells: Sequence[Cell], gradient: int) -> tuple[str, ...]:
    """The parameters that differences between the cells determine. The others keep what they are assumed to be."""
    locals_ = {c.load.local_batch for c in cells if c.load.workers > 1}
    network = _told_apart(cells) and bool(locals_)
    tests = {
        "per_pass": True,
        "per_example": True,
        "per_step": len({c.load.passes for c in cells}) > 1 and len(cells) > 2,
        "seconds_per_byte": network,
        "slowdown": network and len(locals_) >= FEWEST_FOR_SLOWDOWN and len(bucket_sizes(gradient)) > 1,
    }
    return tuple(name for name, holds in tests.items() if holds)


def _model(cells: Sequence[Cell], fitted: Sequence[str], theta: Array) -> tuple[Compute, Hardware]:
    values = dict(zip(fitted, theta.tolist(), strict=True))
    per_byte, own = values.pop("seconds_per_byte", None), PRESETS[OWN] if _told_apart(cells) else INCLUDED
    if per_byte is not None:
        link = Link(latency=own.network.latency, bandwidth=1 / max(per_byte, 1e-15))
        own = own.model_copy(update={"network": link})
    return Compute(**values), own


def _predicted(cells: Sequence[Cell], compute: Compute, own: Hardware, gradient: int) -> Array:
    return np.array([step_seconds(compute, own, gradient, cell.load) for cell in cells])


def _fit(cells: Sequence[Cell], gradient: int, fitted: Sequence[str]) -> tuple[Array, Array]:
    """Least squares of log step times; parameters, none below 0, and the Jacobian of the log times by them."""
    target = np.log([cell.seconds for cell in cells])
    design = np.array([[c.load.passes, c.load.local_batch] for c in cells]) / np.exp(target)[:, None]
    first = nnls(design, np.ones(len(cells)))[0]
    typical = float(np.exp(target.mean()))
    scale = {"per_pass": typical, "per_example": typical / np.mean([c.load.local_batch for c in cells])}
    scale |= {"per_step": typical, "seconds_per_byte": 1 / PRESETS[OWN].network.bandwidth, "slowdown": 0.1}
    scales = np.array([scale[name] for name in fitted])
    start = np.full(len(fitted), 0.1)
    start[:2] = np.maximum(first / scales[:2], 1e-3)

    def residuals(x: Array) -> Array:
        return np.log(_predicted(cells, *_model(cells, fitted, x * scales), gradient)) - target

    found = least_squares(residuals, start, bounds=(0, np.inf), xtol=1e-12, ftol=1e-12, gtol=1e-12)
    return found.x * scales, found.jac / scales


def _scatter(cells: Sequence[Cell], compute: Compute, own: Hardware, gradient: int, parameters: int) -> float:
    """The larger of what cells show about the model and what trials show within cells."""
    residuals = np.log(_predicted(cells, compute, own, gradient) / [cell.seconds for cell in cells])
    free = len(cells) - parameters
    about = math.sqrt(float((residuals**2).sum()) / free) if free > 0 else 0.0
    spreads = [s - np.mean(s) for s in (np.log(cell.trials) for cell in cells) if len(s) > 1]
    seeds = sum(len(s) - 1 for s in spreads)
    within = math.sqrt(sum(float((s**2).sum()) for s in spreads) / seeds) if seeds else 0.0
    return max(about, within) if free > 0 or seeds else ASSUMED_SCATTER


def _backtest(measured: Measured) -> float | None:
    """None unless the fewest workers measured have two local batch sizes of their own, and there are more workers."""
    fewest = min(cell.load.workers for cell in measured.cells)
    known = [cell for cell in measured.cells if cell.load.workers == fewest]
    others = [cell for cell in measured.cells if cell.load.workers > fewest]
    if not others or len({cell.load.micro_batch for cell in known}) < 2:
        return None
    fitted = _identified(known, measured.gradient)
    compute, own = _model(known, fitted, _fit(known, measured.gradient, fitted)[0])
    ratio = _predicted(others, compute, own, measured.gradient) / [cell.seconds for cell in others]
    return float(np.quantile(np.abs(np.log(ratio)), 0.9))
