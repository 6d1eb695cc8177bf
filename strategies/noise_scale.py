"""Gradient noise scale B_simple = tr(Sigma) / |G|^2, measured in training (McCandlish et al. 2018, arXiv 1812.06162).

Compares the gradients of all micro-batches of all workers with their mean, before clipping, without weight decay. Logs
`train_noise_trace` and `train_noise_signal`, unbiased estimates of the two; B_simple over any stretch is the ratio of their
means, never a mean of ratios. It counts one backward pass per micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from strategies.backprop import Update, amend
from strategies.contract import Clock, Metrics, Need, Plan, State, Strategy, Worker
from strategies.parts.noise_probe import NoiseProbe

if TYPE_CHECKING:
    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class NoiseScale(Strategy):
    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: amend(phase, self, updates=(MeasureNoise(),)))


@dataclass(slots=True)
class Measured:
    probe: NoiseProbe
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MeasureNoise(Update):
    turn = 0
    needs = Need.LAYER_GRADS

    def init(self, net: Net, worker: Worker) -> State:
        return State(live=Measured(NoiseProbe(net, worker, "noise_scale")))

    def before(self, state: State, clock: Clock) -> None:
        trace, signal, _ = state.live.probe.share(clock.batch)
        state.live.metrics = {"noise_trace": trace, "noise_signal": signal}

    def metrics(self, state: State) -> Metrics:
        return state.live.metrics
