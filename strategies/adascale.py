"""AdaScale SGD: a large batch's rate follows the gain that it brings (Johnson et al. 2020, arXiv 2007.05105, algorithm 1).

For a batch S times `per`: gain r = (sigma^2 + mu^2) / (sigma^2 / S + mu^2), in [1, S], where sigma^2 is the variance of the
gradient of `per` examples and mu^2 the squared norm of the true gradient, both averaged over late steps. A step at
r x schedule(floor(t)) counts for r iterations of the schedule: t <- t + r. The phase ends when t has gone through the whole
schedule, which the recipe states at batch size `per`; it takes S times as many epochs at most. Made for SGD: the gain tells
nothing of steps that are not along the gradient, so other optimizers are refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from math import floor
from typing import TYPE_CHECKING, ClassVar

from strategies.backprop import Backprop, Update, amend
from strategies.contract import Clock, Metrics, Need, Phase, Plan, PlanError, Schedule, State, Strategy, Worker, option
from strategies.optimizers import Sgd
from strategies.parts.noise_probe import NoiseProbe

if TYPE_CHECKING:
    from strategies.net import Net

MEMORY = 1000  # parts of batches over which the estimates are averaged
ROUNDING = 1e-6  # iterations


@dataclass(frozen=True, slots=True)
class Adascale(Strategy):
    parts_matter: ClassVar[bool] = True
    scales_rate: ClassVar[bool] = True
    per: int = option(256, "batch size at which rate and budget hold as they are: there, plain SGD", ge=1)

    def edit(self, plan: Plan) -> Plan:
        if any(phase.hands_on for phase in plan.phases):
            raise PlanError("adascale goes through one schedule, but the plan has several phases: leave one method out")
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        if phase.batch < self.per:
            raise PlanError(
                f"adascale: per is {self.per}, but the batch is {phase.batch}: expected a batch as large at least"
            )
        if phase.batch == self.per:
            return amend(phase, self, optimizer=plain_sgd)
        amended = amend(phase, self, updates=(FollowGain(self.per),))
        return dataclasses.replace(amended, epochs=phase.epochs * phase.batch / self.per)


def plain_sgd(optimizer: object) -> Sgd:
    """`optimizer`. Raises PlanError if it is another than SGD."""
    if not isinstance(optimizer, Sgd):
        raise PlanError(
            f"adascale's gain is derived for SGD, but the optimizer is {optimizer}: write `optimizer: sgd` without a "
            "strategy that takes its place, or leave adascale out"
        )
    return optimizer


def gain(trace: float, signal: float, per: int, scale: float) -> float:
    """r from tr(Sigma) of one example, |G|^2 and S; 1 without noise, S without signal."""
    noise, signal = max(trace, 0.0) / per, max(signal, 0.0)
    return (noise + signal) / (noise / scale + signal) if noise + signal > 0 else 1.0


@dataclass(slots=True)
class Live:
    """What has been seen of the step in work."""

    probe: NoiseProbe
    steps: int = 0  # iterations of the schedule
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FollowGain(Update):
    per: int
    turn = 0
    needs = Need.LAYER_GRADS

    def suits(self, learner: Backprop) -> None:
        plain_sgd(learner.optimizer)

    def init(self, net: Net, worker: Worker) -> State:
        saved = {"iterations": 0.0, "gain": 1.0, "trace": 0.0, "signal": 0.0, "weight": 0.0}
        return State(saved, Live(NoiseProbe(net, worker, "adascale")))

    def before(self, state: State, clock: Clock) -> None:
        live, saved = state.live, state.saved
        trace, signal, parts = live.probe.measure(clock.batch)
        kept = max(1 - parts.item() / MEMORY, 0.0)
        for name, value in (("trace", trace.item()), ("signal", signal.item()), ("weight", 1.0)):
            saved[name] = kept * saved[name] + (1 - kept) * value
        mean_trace, mean_signal = saved["trace"] / saved["weight"], saved["signal"] / saved["weight"]
        saved["gain"] = gain(mean_trace, mean_signal, self.per, clock.batch / self.per)
        live.steps, live.metrics = clock.steps, {"noise_trace": trace, "noise_signal": signal}

    def rate(self, state: State, schedule: Schedule, clock: Clock) -> float:
        """The gain times the schedule's rate at the iteration that has been reached, which small batches would make."""
        step, per_step = floor(state.saved["iterations"]), clock.epochs_per_step * self.per / clock.batch
        there = dataclasses.replace(clock, step=step, epoch=step * per_step, epochs_per_step=per_step, batch=self.per)
        rate = state.saved["gain"] * schedule(there)
        metrics = state.live.metrics
        metrics |= {k: metrics["noise_trace"].new_tensor(v) for k, v in (("gain", state.saved["gain"]), ("rate", rate))}
        return rate

    def after(self, state: State, clock: Clock) -> None:
        state.saved["iterations"] += state.saved["gain"]

    def ended(self, state: State) -> bool:
        return state.saved["iterations"] > state.live.steps - ROUNDING

    def metrics(self, state: State) -> Metrics:
        return {name: value / state.live.probe.worker.size for name, value in state.live.metrics.items()}
