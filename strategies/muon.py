"""Muon: hidden weight matrices move by the orthogonalised momentum (Jordan et al. 2024; torch.optim.Muon).

The base optimizer keeps the rest: the head, biases, norm parameters, and convolutions, whose weights torch's Muon does not
take (they have more than two dimensions). Orthogonalisation is done in bfloat16 whatever the precision of the trial.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from strategies.backprop import amend
from strategies.contract import Plan, PlanError, Strategy, option
from strategies.optimizers import AdamW, Sgd
from strategies.parts.layers import WholeLayers

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class Muon(Strategy):
    rate: float = option(1.0, "learning rate of Muon's matrices, times the base rate", gt=0)
    momentum: float = option(0.95, "share of the momentum that stays", ge=0, lt=1)
    weight_decay: float = option(0.1, "decoupled decay of Muon's matrices: w <- w (1 - rate x decay)", ge=0)
    adjust: Literal["original", "match_rms_adamw"] = option(
        "original", "rate times sqrt(max(1, rows / columns)), or times 0.2 sqrt(max(rows, columns))"
    )
    smallest: int = option(1, "shorter side from which on a matrix is Muon's", ge=1)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: amend(phase, self, updates=(WholeLayers(),), optimizer=self._optimizer))

    def _optimizer(self, old: object) -> MuonAndBase:
        if not isinstance(old, Sgd | AdamW):
            raise PlanError(
                f"muon shares the weights with sgd or adamw, but the optimizer is {old}: leave one method out"
            )
        return MuonAndBase(old, self)


@dataclass(frozen=True, slots=True)
class MuonAndBase:
    base: Sgd | AdamW
    options: Muon

    def __call__(self, net: Net) -> Optimizer:
        from torch.optim import Muon

        from strategies.parts.joint_optimizer import JointOptimizer, without

        taken, o = self.matrices(net), self.options
        group = {"params": taken, "rate_factor": o.rate}
        muon = Muon([group], lr=0.0, weight_decay=o.weight_decay, momentum=o.momentum, adjust_lr_fn=o.adjust)
        return JointOptimizer(muon, without(self.base(net), taken))

    def matrices(self, net: Net) -> list[nn.Parameter]:
        """Trainable weight matrices outside the head. Raises PlanError if there is none of any size."""
        found = [p for p in net.stages.parameters() if p.requires_grad and p.ndim == 2]
        if not found:
            raise PlanError("muon moves weight matrices outside the head, but the network has none: use another method")
        return [p for p in found if min(p.shape) >= self.options.smallest]
