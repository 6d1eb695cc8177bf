"""Bias rate: the biases of normalisation layers learn faster than the rest of the network.

Their rate is `factor` times the base rate; they are not decayed (Page 2019, "How to train your ResNet"; Jordan 2024,
arXiv 2404.00498).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.backprop import amend
from strategies.contract import Phase, Plan, PlanError, Strategy, option

if TYPE_CHECKING:
    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class BiasRate(Strategy):
    factor: float = option(64.0, "rate of the biases of normalisation layers, times the base rate", gt=0)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._speed_up)

    def _speed_up(self, phase: Phase) -> Phase:
        return dataclasses.replace(amend(phase, self), surgery=(*phase.surgery, FactorOnBiases(self.factor)))


@dataclass(frozen=True, slots=True)
class FactorOnBiases:
    factor: float

    def __call__(self, net: Net) -> Net:
        from torch import nn
        from torch.nn.modules.batchnorm import _NormBase

        norms = [(name, m) for name, m in net.named_modules() if isinstance(m, _NormBase | nn.GroupNorm | nn.LayerNorm)]
        names = [f"{name}.bias" for name, norm in norms if norm.bias is not None]
        if not names:
            raise PlanError("bias_rate is for biases of normalisation layers, but the network has none: leave it out")
        net.rate_factors |= dict.fromkeys(names, self.factor)
        return net
