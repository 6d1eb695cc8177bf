"""Gradient noise scale B_simple = tr(Sigma) / |G|^2, measured in training (McCandlish et al. 2018, arXiv 1812.06162).

Compares the gradients of all micro-batches of all workers with their mean, before clipping, without weight decay. Logs
`train_noise_trace` and `train_noise_signal`, unbiased estimates of the two; B_simple over any stretch is the ratio of their
means, never a mean of ratios. It counts one backward pass per micro-batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.backprop import Update, amend
from strategies.contract import Clock, Metrics, Need, Phase, Plan, PlanError, State, Strategy, Worker
from strategies.gradient_noise import from_sums

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class NoiseScale(Strategy):
    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._measure)

    def _measure(self, phase: Phase) -> Phase:
        amended = amend(phase, self)
        learner: Any = amended.learner
        first = dataclasses.replace(learner, updates=(MeasureNoise(), *learner.updates))  # before any other changes g
        return dataclasses.replace(amended, learner=first)


@dataclass(slots=True)
class Tally:
    """What one worker has seen in one step."""

    parameters: list[Tensor]
    worker: Worker
    size: int = 0  # examples of the micro-batch in work
    parts: int = 0
    weighted: Any = 0.0  # sum of |share_i g_i|^2 / size_i
    metrics: Metrics = dataclasses.field(default_factory=dict)

    def forward(self, net: Any, inputs: tuple[Tensor, ...]) -> None:
        if net.training:
            self.size, self.parts = len(inputs[0]), self.parts + 1

    def backward(self, grad: Tensor) -> None:
        self.weighted = self.weighted + grad.detach().double().square().sum() / self.size


@dataclass(frozen=True, slots=True)
class MeasureNoise(Update):
    needs = Need.LAYER_GRADS

    def init(self, net: Net, worker: Worker) -> State:
        tally = Tally([p for p in net.parameters() if p.requires_grad], worker)
        net.register_forward_pre_hook(tally.forward)
        for p in tally.parameters:
            p.register_hook(tally.backward)  # sees what this backward pass adds, before it is averaged over workers
        return State(live=tally)

    def before(self, state: State, clock: Clock) -> None:
        import torch

        tally, workers = state.live, state.live.worker.size
        if tally.parts * workers < 2:
            raise PlanError(
                "noise_scale compares parts of a batch, but there is one: add workers, or halve base.micro_batch"
            )
        own = torch.stack([tally.weighted * (clock.batch / workers) ** 2, tally.weighted.new_tensor(tally.parts)])
        weighted, parts = tally.worker.sum_(own)
        mean_square = sum(p.grad.double().square().sum() for p in tally.parameters if p.grad is not None)
        trace, signal = from_sums(weighted, parts, clock.batch, mean_square)
        tally.metrics = {"noise_trace": trace / workers, "noise_signal": signal / workers}
        tally.parts, tally.weighted = 0, 0.0

    def metrics(self, state: State) -> Metrics:
        return state.live.metrics
