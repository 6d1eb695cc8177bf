"""Stochastic weight averaging: the equal average of late weights, in their place (Izmailov et al. 2018, arXiv 1803.05407).

Weights enter after each step beyond `start`; until then the network's own are evaluated. Networks with batch norm are
refused: the running statistics of averaged weights would have to be estimated anew from training data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.backprop import Update, amend
from strategies.contract import Clock, Plan, PlanError, State, Strategy, Worker, option

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class Swa(Strategy):
    start: float = option(0.75, "share of the run after which weights are averaged; 1: never", ge=0, le=1)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: amend(phase, self, updates=(LateAverage(self.start),)))


@dataclass(frozen=True, slots=True)
class LateAverage(Update):
    start: float

    def init(self, net: Net, worker: Worker) -> State:
        _refuse_running_statistics(net)
        own = dict(net.named_parameters())
        average = {name: p.detach().clone() for name, p in own.items()}
        return State({"averaged": 0, "average": average}, live=own)

    def after(self, state: State, clock: Clock) -> None:
        import torch

        if clock.step + 1 <= self.start * clock.steps:
            return
        state.saved["averaged"] += 1
        averages = [state.saved["average"][name] for name in state.live]
        with torch.no_grad():
            torch._foreach_lerp_(averages, list(state.live.values()), 1 / state.saved["averaged"])

    def weights(self, state: State) -> Mapping[str, Tensor] | None:
        return state.saved["average"] if state.saved["averaged"] else None


def _refuse_running_statistics(net: Net) -> None:
    from torch.nn.modules.batchnorm import _BatchNorm

    names = [name for name, m in net.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if names:
        raise PlanError(
            f"swa averages weights, but the running statistics of {len(names)} batch norms ({names[0]}, ...) do not "
            "follow: choose a model without batch norm, or leave swa out"
        )
