"""Clipping by the global norm: g <- g min(1, limit / |g|) (Pascanu et al. 2013, arXiv 1211.5063, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from strategies.backprop import Update, amend
from strategies.contract import Clock, Need, Plan, State, Strategy, Worker, option

if TYPE_CHECKING:
    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class GradientClipping(Strategy):
    norm: float = option(1.0, "largest Euclidean norm of the whole gradient, averaged over the global batch", gt=0)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: amend(phase, self, updates=(ClipNorm(self.norm),)))


@dataclass(frozen=True, slots=True)
class ClipNorm(Update):
    norm: float = inf
    needs = Need.LAYER_GRADS

    def init(self, net: Net, worker: Worker) -> State:
        return State(live=[p for p in net.parameters() if p.requires_grad])

    def before(self, state: State, clock: Clock) -> None:
        import torch

        grads = [p.grad for p in state.live if p.grad is not None]
        total = torch.nn.utils.get_total_norm(grads)
        scale = (self.norm / total).clamp(max=1.0)  # no epsilon: a gradient under the limit stays as it is, bit for bit
        torch._foreach_mul_(grads, scale)
