"""What methods that work layer by layer share: the need for whole layers, their parameter groups, the convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strategies.backprop import Update
from strategies.contract import Need
from strategies.optimizers import groups

if TYPE_CHECKING:
    from torch import nn

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class WholeLayers(Update):
    """Changes nothing: tells the engine that the optimizer takes norms over whole layers."""

    needs = Need.LAYER_GRADS


def layer_groups(net: Net, decay: float, trust: float) -> list[dict[str, Any]]:
    """Parameter groups with `decay` and `trust`; both are 0 for biases and norm parameters (fewer than 2 dimensions)."""
    return [
        {
            "params": g["params"],
            "decay": g["weight_decay"],
            "trust": trust if g["params"][0].ndim >= 2 else 0.0,
            "rate_factor": g["rate_factor"],
        }
        for g in groups(net, decay)
    ]


def convolutions(net: Net) -> list[nn.Conv2d]:
    """The two-dimensional convolutions, in the order of the network."""
    from torch import nn

    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]
