"""LAMB: AdamW whose step in each layer follows the norm of its weights (You et al. 2020, arXiv 1904.00962, algorithm 2).

u = mhat / (sqrt(vhat) + eps) + decay w; w <- w - rate (|w| / |u|) u. The moments, eps and decay are those of the base
optimizer, AdamW. Biases and norm parameters: ratio 1, no decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.backprop import amend
from strategies.contract import Plan, PlanError, Strategy, option
from strategies.optimizers import AdamW
from strategies.parts.layers import WholeLayers, layer_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class Lamb(Strategy):
    trust: bool = option(True, "scale each layer's step by |w| / |u|; false: plain AdamW")
    bias_correction: bool = option(True, "divide the moments by 1 - beta^t")
    clip: float | None = option(None, "largest ratio |w| / |u|; none: no limit, as published", gt=0)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: amend(phase, self, updates=(WholeLayers(),), optimizer=self._optimizer))

    def _optimizer(self, old: object) -> LayerwiseAdam:
        if not isinstance(old, AdamW):
            raise PlanError(f"lamb scales the steps of AdamW, but the optimizer is {old}: write `optimizer: adamw`")
        return LayerwiseAdam(old, self.trust, self.bias_correction, self.clip)


@dataclass(frozen=True, slots=True)
class LayerwiseAdam:
    adamw: AdamW
    trust: bool
    bias_correction: bool
    clip: float | None

    def __call__(self, net: Net) -> Optimizer:
        from strategies.parts.trust_ratio import LambOptimizer

        adamw = self.adamw
        return LambOptimizer(
            layer_groups(net, adamw.weight_decay, float(self.trust)),
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.eps,
            bias_correction=self.bias_correction,
            clip=self.clip,
        )
