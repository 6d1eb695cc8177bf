"""Dirac: each convolution but the first starts with its first filters passing their input channels on unchanged.

Filter i is the identity on channel i, and the rest stay as the model starts them (Zagoruyko & Komodakis 2017,
arXiv 1706.00388; as a start alone: Jordan 2024, arXiv 2404.00498).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.contract import Batch, Phase, Plan, PlanError, Strategy, option

if TYPE_CHECKING:
    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class Dirac(Strategy):
    share: float = option(1.0, "share of a layer's input channels that are passed on; 0: none", ge=0, le=1)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._initialise)

    def _initialise(self, phase: Phase) -> Phase:
        return dataclasses.replace(phase, initialise=(*phase.initialise, PassOn(self.share)))


@dataclass(frozen=True, slots=True)
class PassOn:
    share: float

    def __call__(self, net: Net, read: Callable[[int], Batch]) -> None:
        from torch import nn

        from strategies.parts.layers import convolutions

        later = [conv for conv in convolutions(net)[1:] if conv.groups == 1]
        if not later:
            raise PlanError("dirac sets convolutions behind the first, but the network has none: choose another model")
        for conv in later:
            passed = round(self.share * min(conv.in_channels, conv.out_channels))
            nn.init.dirac_(conv.weight.detach()[:passed])
