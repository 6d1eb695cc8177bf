"""Whitening: the first convolution is frozen with filters that whiten the patches of the training images.

Half of its filters are v / sqrt(lambda + eps), for the eigenvectors v of the patches' covariance with the largest eigenvalues
lambda, and the other half their negatives, so that a rectifier behind them loses nothing. A bias, if there is one, is learnt
(Page 2019, "How to train your ResNet"; Jordan 2024, arXiv 2404.00498).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.contract import Batch, Initialise, Phase, Plan, PlanError, Strategy, option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from strategies.net import Net

CHUNK = 256  # images whose patches are in memory at once


@dataclass(frozen=True, slots=True)
class Whitening(Strategy):
    examples: int = option(5000, "first training images whose patches are whitened; 0: no whitening", ge=0)
    eps: float = option(5e-4, "added to the variance along each component before its root is taken", gt=0)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._whiten) if self.examples else plan

    def _whiten(self, phase: Phase) -> Phase:
        initialise: tuple[Initialise, ...] = (*phase.initialise, WhitenFirst(self.examples, self.eps))
        return dataclasses.replace(phase, surgery=(*phase.surgery, freeze_first), initialise=initialise)


def freeze_first(net: Net) -> Net:
    """The net with its first convolution's weights frozen. Raises PlanError if its filters cannot be whitening ones."""
    conv = _first(net)
    entries, filters = conv.weight[0].numel(), conv.out_channels
    if filters % 2 or filters > 2 * entries or conv.groups > 1:
        raise PlanError(
            f"whitening makes an even number of up to {2 * entries} filters of a patch of {entries} values in one "
            f"group, but the first convolution has {filters} filters in {conv.groups}: choose another model or width"
        )
    conv.weight.requires_grad_(False)
    return net


@dataclass(frozen=True, slots=True)
class WhitenFirst:
    examples: int
    eps: float

    def __call__(self, net: Net, read: Callable[[int], Batch]) -> None:
        import torch

        conv = _first(net)
        values, vectors = principal(covariance(read(self.examples).x, conv))
        filters = (vectors / (values + self.eps).sqrt()).T[: conv.out_channels // 2]
        with torch.no_grad():
            conv.weight.copy_(torch.cat([filters, -filters]).view_as(conv.weight))


def covariance(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """(k, k) float64 covariance of the patches of k values that `conv` sees inside the images `x` (n, c, h, w)."""
    import torch
    from torch.nn.functional import unfold

    if x.ndim != 4 or x.shape[1] != conv.in_channels:
        raise PlanError(
            f"whitening needs images of {conv.in_channels} channels, the examples have shape {tuple(x.shape[1:])}: "
            "choose another model or leave whitening out"
        )
    patch = tuple(d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    if any(side < taps for side, taps in zip(x.shape[2:], patch, strict=True)):
        raise PlanError(
            f"whitening takes patches of {patch[0]} x {patch[1]} pixels out of the images, the examples have shape "
            f"{tuple(x.shape[1:])}: take larger images or a model with a smaller first kernel"
        )
    sums: list[Tensor] = []
    for part in x.split(CHUNK):
        patches = unfold(part.double(), conv.kernel_size, conv.dilation, stride=conv.stride).transpose(0, 1).flatten(1)
        one = torch.ones_like(patches[:1])
        sums.append(torch.cat([patches, one]) @ torch.cat([patches, one]).T)  # of products; of values; their number
    total = torch.stack(sums).sum(0)
    moments = total[:-1] / total[-1, -1]
    return moments[:, :-1] - torch.outer(moments[:, -1], moments[:, -1])


def principal(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(k,) eigenvalues, largest first, and (k, k) eigenvectors as columns, each with its largest entry positive."""
    import torch

    values, vectors = torch.linalg.eigh(covariance)
    largest = vectors.abs().argmax(0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()  # else the sign would depend on the machine
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _first(net: Net) -> nn.Conv2d:
    from strategies.parts.layers import convolutions

    found = convolutions(net)
    if not found:
        raise PlanError("whitening sets the first convolution, but the network has none: choose another model")
    return found[0]
