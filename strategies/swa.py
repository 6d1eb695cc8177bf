"""Stochastic weight averaging: the equal average of late weights, in their place (Izmailov et al. 2018, arXiv 1803.05407).

Weights enter after each step beyond `start` of a phase; until then the network's own are evaluated. Running statistics of
batch norms, which training left behind for other weights, are estimated anew over training examples before each evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.backprop import Backprop, Update, amend
from strategies.contract import Batch, Clock, Need, Plan, PlanError, State, Strategy, Worker, option
from strategies.parts.batch_norm import reestimate, statistics, tracking

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class Swa(Strategy):
    start: float = option(0.75, "share of each phase after which its weights are averaged; 1: never", ge=0, le=1)
    examples: int = option(1024, "training examples, at most, over which batch norms' statistics are estimated", ge=2)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: amend(phase, self, updates=(LateAverage(self.start, self.examples),)))


@dataclass(frozen=True, slots=True)
class Live:
    net: Net
    worker: Worker
    own: Mapping[str, Tensor]  # the network's parameters


@dataclass(frozen=True, slots=True)
class LateAverage(Update):
    start: float
    examples: int = 1024
    needs = Need.LAYER_WEIGHTS

    def suits(self, learner: Backprop) -> None:
        if learner.ends_itself:
            raise PlanError(
                "swa starts at a share of a phase's steps, but adascale ends it before: leave one of the two out"
            )

    def init(self, net: Net, worker: Worker) -> State:
        own = dict(net.named_parameters())
        average = {name: t.detach().clone() for name, t in (own | statistics(net)).items()}
        return State({"averaged": 0, "average": average}, Live(net, worker, own))

    def after(self, state: State, clock: Clock) -> None:
        import torch

        if clock.step + 1 <= self.start * clock.steps:
            state.saved["averaged"] = 0  # an average of the phase before is of other weights
            return
        state.saved["averaged"] += 1
        averages = [state.saved["average"][name] for name in state.live.own]
        with torch.no_grad():
            torch._foreach_lerp_(averages, list(state.live.own.values()), 1 / state.saved["averaged"])

    def refresh(self, state: State, read: Callable[[int], Batch]) -> None:
        live: Live = state.live
        if state.saved["averaged"] and tracking(live.net):
            reestimate(live.net, read(self.examples).x, live.worker, state.saved["average"])

    def weights(self, state: State) -> Mapping[str, Tensor] | None:
        return state.saved["average"] if state.saved["averaged"] else None
