"""Gradient noise convolution: workers stand apart by their gradient noise (Haruki et al. 2019, arXiv 1906.10822).

Worker j takes its gradient at w + scale (g_j - g), where g_j is its own mean gradient in the step before, and g that of all.
Their mean is the gradient of a loss convolved with the noise of gradients, without a further pass. A worker alone has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from strategies.backprop import Gradient, Step, Update, amend
from strategies.contract import Clock, Need, Phase, Plan, Schedule, State, Strategy, Worker, option
from strategies.parts.annealing import Anneal, falling
from strategies.parts.displaced import displaced
from strategies.parts.replicas import gathered, scatter_

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class GradientNoiseConvolution(Strategy):
    parts_matter: ClassVar[bool] = True
    scale: float = option(0.1, "distance of a worker from the weights, times its gradient noise; 0: plain SGD", ge=0)
    anneal: Anneal = option("none", "how the scale falls to 0 over each phase, if at all")

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._amend) if self.scale else plan

    def _amend(self, phase: Phase) -> Phase:
        scale = falling(self.scale, self.anneal)
        return amend(phase, self, updates=(OwnNoise(),), gradient=lambda inner: Apart(inner, scale))


class Noise:
    """g_j - g of the step before, by parameter, and the sum of what this worker's passes have added in this step."""

    def __init__(self, net: Net, worker: Worker):
        import torch

        self.worker = worker
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.last, self.sums = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.weight = 0.0  # of the passes in the sum
        for p, total in zip(self.parameters, self.sums, strict=True):
            p.register_hook(partial(_add, total))  # before gradients are averaged over workers

    def measure(self) -> None:
        """From the sum, and from p.grad, which is the mean over all workers by now."""
        for p, total, last in zip(self.parameters, self.sums, self.last, strict=True):
            last.copy_(total / self.weight - (0.0 if p.grad is None else p.grad))
            total.zero_()
        self.weight = 0.0


def _add(total: Tensor, grad: Tensor) -> None:
    total += grad


@dataclass(frozen=True, slots=True)
class OwnNoise(Update):
    turn = 0
    needs = Need.LAYER_GRADS | Need.EDIT_WEIGHTS

    def init(self, net: Net, worker: Worker) -> State:
        return State({"workers": []}, Noise(net, worker))

    def before(self, state: State, clock: Clock) -> None:
        state.live.measure()

    def settle(self, state: State) -> None:
        state.saved["workers"] = gathered(state.live.last, state.live.worker)


@dataclass(frozen=True, slots=True)
class Apart:
    """The gradient `inner`, where this worker's noise points."""

    inner: Gradient
    scale: Schedule

    @property
    def needs(self) -> Need:
        return getattr(self.inner, "needs", Need.NOTHING)

    def __call__(self, step: Step) -> Tensor:
        noise, scale = found(step.updates), self.scale(step.clock)
        noise.weight += step.weight
        with displaced(noise.parameters, [scale * move for move in noise.last]):
            return self.inner(step)


def found(updates: Sequence[State]) -> Noise:
    """This worker's, taken out of what was gathered before the last row, if that was the last step."""
    state = next(state for state in updates if isinstance(state.live, Noise))
    noise: Noise = state.live
    if state.saved["workers"]:
        scatter_(state.saved["workers"], noise.last, noise.worker.rank)
        state.saved["workers"] = []
    return noise
