"""LARS: each layer's step follows the norm of its weights (You, Gitman & Ginsburg 2017, arXiv 1708.03888, algorithm 1).

local = trust |w| / (|g| + decay |w|); v <- m v + rate local (g + decay w); w <- w - v. That is the published form, in which
the rate enters the momentum buffer; torch's form, v <- m v + local (g + decay w); w <- w - rate v, differs while the rate
changes. Momentum and decay are those of the base optimizer; with its `nesterov: true`, which is not published, the step is
u + m v, where u is what entered v. Biases and norm parameters: local = 1, no decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from strategies.backprop import amend
from strategies.contract import Plan, PlanError, Strategy, option
from strategies.optimizers import Sgd
from strategies.parts.layers import WholeLayers, layer_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class Lars(Strategy):
    trust: float = option(0.001, "share of its weights' norm by which a layer moves at rate 1; 0: plain SGD", ge=0)
    form: Literal["published", "torch"] = option(
        "published", "the rate inside the momentum buffer, or outside as in torch"
    )

    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: amend(phase, self, updates=(WholeLayers(),), optimizer=self._optimizer))

    def _optimizer(self, old: object) -> LayerwiseSgd:
        if not isinstance(old, Sgd):
            raise PlanError(f"lars scales the steps of SGD, but the optimizer is {old}: write `optimizer: sgd`")
        return LayerwiseSgd(old, self.trust, rate_inside=self.form == "published")


@dataclass(frozen=True, slots=True)
class LayerwiseSgd:
    sgd: Sgd
    trust: float
    rate_inside: bool

    def __call__(self, net: Net) -> Optimizer:
        from strategies.parts.trust_ratio import LarsOptimizer

        layers = layer_groups(net, self.sgd.weight_decay, self.trust)
        return LarsOptimizer(layers, self.sgd.momentum, self.sgd.nesterov, self.rate_inside)
