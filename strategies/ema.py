"""Exponential moving average of the weights: a <- d a + (1 - d) w after each step, evaluated in place of w.

d = 2^(-1 / half-life). The half-life is stated in epochs, so that the average spans the same examples at every batch size
(d -> d^k when the batch grows k times: Busbridge et al. 2023, arXiv 2307.13813).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.backprop import Update, amend
from strategies.contract import Clock, Need, Plan, State, Strategy, Worker, option

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class Ema(Strategy):
    half_life: float = option(1.0, "epochs after which a weight's say has halved; 0: no averaging", ge=0)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: amend(phase, self, updates=(Average(self.half_life),)))


@dataclass(frozen=True, slots=True)
class Average(Update):
    half_life: float = 1.0
    needs = Need.LAYER_WEIGHTS

    def init(self, net: Net, worker: Worker) -> State:
        own = dict(net.named_parameters())
        return State({name: p.detach().clone() for name, p in own.items()}, live=own)

    def after(self, state: State, clock: Clock) -> None:
        import torch

        decay = 0.5 ** (clock.epochs_per_step / self.half_life) if self.half_life else 0.0
        averages = [state.saved[name] for name in state.live]
        with torch.no_grad():
            torch._foreach_lerp_(averages, list(state.live.values()), 1 - decay)

    def weights(self, state: State) -> Mapping[str, Tensor]:
        return state.saved
