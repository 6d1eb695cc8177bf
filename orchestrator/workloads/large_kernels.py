"""Networks with kernels larger than 3x3, whose sides are options, so that `kernel_rescale` can ask for smaller ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.workloads.layers import head, image_channels, linear
from strategies.contract import PlanError
from strategies.net import Net

OVERFEAT = (96, 256, 512, 1024, 1024)  # channels of the convolutions
ALEXNET = (64, 192, 384, 256, 256)


def overfeat(inputs: tuple[int, ...], classes: int, kernels: Sequence[int], dropout: float) -> Net:
    """The fast model of Sermanet et al. 2014, arXiv 1312.6229, table 1, made for images of 231 pixels a side.

    `kernels`: of the first convolution, of stride 4, of the second, both without padding, and of the other three. Its first
    linear layer is a convolution as large as its map.
    """
    image_channels("overfeat", inputs)
    first, second, rest = kernels
    convolutions = [(first, 4, 0), (second, 1, 0), *[(rest, 1, rest // 2)] * 3]
    pools = [nn.MaxPool2d(2) for _ in range(3)]
    stages = _stages(inputs[0], OVERFEAT, convolutions, pools)
    sides = _sides("overfeat", inputs, stages)
    map_wide = _started(nn.Conv2d(OVERFEAT[-1], 3072, sides))
    stages.append(nn.Sequential(map_wide, nn.ReLU(), nn.Flatten(), nn.Dropout(dropout)))
    stages.append(nn.Sequential(linear(3072, 4096), nn.ReLU(), nn.Dropout(dropout)))
    return Net(stages, head=head(4096, classes))


def small_overfeat(inputs: tuple[int, ...], classes: int, kernels: Sequence[int], width: int, dropout: float) -> Net:
    """`overfeat` for images of 32 pixels a side: convolutions padded and of stride 1, channels and linear layers in
    proportion. `width`: channels of the first convolution."""
    widths = [round(width * channels / OVERFEAT[0]) for channels in OVERFEAT]
    pools = [nn.MaxPool2d(2) for _ in range(3)]
    return _flat("small_overfeat", inputs, classes, widths, kernels, pools, 16 * width, dropout)


def alexnet(inputs: tuple[int, ...], classes: int, kernels: Sequence[int], width: int, dropout: float) -> Net:
    """After Krizhevsky 2014, arXiv 1404.5997, for images of 32 pixels a side: convolutions of stride 1, overlapping pools.

    `kernels` as in `overfeat`; `width`: channels of the first convolution.
    """
    widths = [round(width * channels / ALEXNET[0]) for channels in ALEXNET]
    pools = [nn.MaxPool2d(3, 2, padding=1) for _ in range(3)]
    return _flat("alexnet", inputs, classes, widths, kernels, pools, 16 * width, dropout)


def _flat(
    name: str,
    inputs: tuple[int, ...],
    classes: int,
    widths: Sequence[int],
    kernels: Sequence[int],
    pools: Sequence[nn.Module],
    hidden: int,
    dropout: float,
) -> Net:
    """Five padded convolutions with pools behind the first, second and last; two hidden linear layers on the flattened map."""
    image_channels(name, inputs)
    first, second, rest = kernels
    stages = _stages(inputs[0], widths, [(k, 1, k // 2) for k in (first, second, rest, rest, rest)], pools)
    high, wide = _sides(name, inputs, stages)
    features = widths[-1] * high * wide
    stages.append(nn.Sequential(nn.Flatten(), linear(features, hidden), nn.ReLU(), nn.Dropout(dropout)))
    stages.append(nn.Sequential(linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout)))
    return Net(stages, head=head(hidden, classes))


def _stages(
    channels: int, widths: Sequence[int], convolutions: Sequence[tuple[int, int, int]], pools: Sequence[nn.Module]
) -> list[nn.Module]:
    """A stage for each convolution (kernel, stride, padding) with its ReLU; pools end the first, the second and the last."""
    ends = {0: pools[0], 1: pools[1], len(widths) - 1: pools[2]}
    stages: list[nn.Module] = []
    for n, (before, out) in enumerate(pairwise((channels, *widths))):
        kernel, stride, padding = convolutions[n]
        layer = _started(nn.Conv2d(before, out, kernel, stride, padding))
        stages.append(nn.Sequential(layer, nn.ReLU(), *([ends[n]] if n in ends else [])))
    return stages


def _sides(name: str, inputs: tuple[int, ...], stages: Sequence[nn.Module]) -> tuple[int, int]:
    """(h, w) of the map that the stages make of an image. Raises PlanError if nothing is left of it."""
    high, wide = inputs[1:]
    for layer in (m for stage in stages for m in stage.modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d)):
        kernel, stride, padding = (
            v if isinstance(v, int) else int(v[0]) for v in (layer.kernel_size, layer.stride, layer.padding)
        )
        high, wide = ((side + 2 * padding - kernel) // stride + 1 for side in (high, wide))
        if min(high, wide) < 1:
            raise PlanError(
                f"model {name}: images of shape {inputs} are too small for it: choose another, or larger images"
            )
    return high, wide


def _started(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


# ------------------------------------------------------------------------------------------------------------- ConvNeXt


def convnext(inputs: tuple[int, ...], classes: int, kernel: int, width: int, blocks: Sequence[int], patch: int) -> Net:
    """After Liu et al. 2022, arXiv 2201.03545, for small images: depthwise convolutions with a large kernel.

    The stem takes patches of `patch` pixels a side apart; `blocks` per stage, whose channels double and whose sides halve.
    Depthwise convolutions have no biases, which the norms behind them make superfluous.
    """
    channels = image_channels("convnext", inputs)
    if min(inputs[1:]) < patch * 2 ** (len(blocks) - 1):
        raise PlanError(f"model convnext: images of shape {inputs} are too small for {len(blocks)} stages: take fewer")
    widths = [width * 2**n for n in range(len(blocks))]
    stages: list[nn.Module] = [nn.Sequential(nn.Conv2d(channels, width, patch, patch), ChannelNorm(width))]
    for n, count in enumerate(blocks):
        halve = [ChannelNorm(widths[n - 1]), nn.Conv2d(widths[n - 1], widths[n], 2, 2)] if n else []
        stages.append(nn.Sequential(*halve, *(Inverted(widths[n], kernel) for _ in range(count))))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1], eps=1e-6))
    net = Net(stages, pool, nn.Linear(widths[-1], classes))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of (n, c, h, w)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class Inverted(nn.Module):
    """x + scale * (1x1 to x GELU x 1x1 from four times the channels x norm x depthwise)(x); the scale starts at 1e-6."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        wide = (nn.Conv2d(channels, 4 * channels, 1), nn.GELU(), nn.Conv2d(4 * channels, channels, 1))
        self.branch = nn.Sequential(depthwise, ChannelNorm(channels), *wide)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale.view(-1, 1, 1) * self.branch(x)
