"""Ghost batch norm: normalise over small parts of a large batch (Hoffer, Hubara & Soudry 2017, arXiv 1705.08741, section 4).

Each batch norm takes mean and variance over parts of at most `size` examples of a worker's micro-batch, as few as can be and
alike to one example. W workers that each normalise their own b examples equal one process with parts of b.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from strategies.backprop import Update, amend
from strategies.contract import Clock, Phase, Plan, State, Strategy, Worker, option

if TYPE_CHECKING:
    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class GhostBatchNorm(Strategy):
    size: int = option(128, "examples that are normalised together, at most", ge=2)
    statistics: Literal["mean", "in_order"] = option(
        "mean",
        "running statistics: one step per optimizer step with the mean over all parts on all workers, "
        "or one per part in order, as published",
    )

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        in_order = self.statistics == "in_order"
        phase = dataclasses.replace(phase, surgery=(*phase.surgery, SplitNorms(self.size, in_order)))
        return phase if in_order else amend(phase, self, updates=(RunningMeans(),))


@dataclass(frozen=True, slots=True)
class SplitNorms:
    size: int
    in_order: bool

    def __call__(self, net: Net) -> Net:
        from strategies.parts.ghost_layer import split

        return split(net, self.size, self.in_order)


@dataclass(frozen=True, slots=True)
class RunningMeans(Update):
    """Moves running statistics once per step, alike on all workers: neither their number nor micro-batches matter."""

    def init(self, net: Net, worker: Worker) -> State:
        from strategies.parts.ghost_layer import ghosts

        layers = ghosts(net)
        for layer in layers:
            layer.forget()  # what the search for the micro-batch left behind
        return State(live=(layers, worker))

    def before(self, state: State, clock: Clock) -> None:
        import torch

        layers, worker = state.live
        sums = worker.sum_(torch.cat([layer.sums for layer in layers]))
        for layer, part in zip(layers, sums.split([len(layer.sums) for layer in layers]), strict=True):
            layer.absorb(part)
