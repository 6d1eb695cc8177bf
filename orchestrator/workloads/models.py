"""The networks that recipes name, as `Net`s that strategies can take apart.

Weights start as in the literature: He normal before a ReLU, zero biases, and gamma = 0 in the last batch norm of
every residual branch, so that a residual network starts as its shortcuts alone.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.workloads.large_kernels import alexnet, convnext, overfeat, small_overfeat
from orchestrator.workloads.layers import average, conv, head, image_channels, linear, rectified
from orchestrator.workloads.plain_cnn import plain_cnn
from strategies.contract import PlanError
from strategies.net import Net


def build_network(inputs: tuple[int, ...], classes: int, name: str, **options: Any) -> Net:
    """The network that recipes call `name`, for inputs of shape (c, h, w) or (d,). Raises PlanError if it can't be."""
    return BUILDERS[name](inputs, classes, **options)


def mlp(inputs: tuple[int, ...], classes: int, width: int, depth: int) -> Net:
    """`depth` linear layers; a stage for each but the last, which is the head."""
    sizes = [math.prod(inputs), *[width] * (depth - 1)]
    hidden = [nn.Sequential(linear(size, out), nn.ReLU()) for size, out in pairwise(sizes)]
    return Net([nn.Flatten(), *hidden], head=head(sizes[-1], classes))


def small_cnn(inputs: tuple[int, ...], classes: int, width: int, batch_norm: bool, kernel: int = 3) -> Net:
    """Three stages of a convolution; the side is halved after the first two, the channels double."""
    channels, stages = image_channels("small_cnn", inputs), []
    for i, out in enumerate((width, 2 * width, 4 * width)):
        layers = rectified(channels, out, kernel, batch_norm)
        stages.append(nn.Sequential(*layers, *([nn.MaxPool2d(2, ceil_mode=True)] if i < 2 else [])))
        channels = out
    return Net(stages, average(), head(channels, classes))


VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}  # convolutions per stage


def vgg(inputs: tuple[int, ...], classes: int, depth: int, width: int) -> Net:
    """Five stages of 3x3 convolutions with batch norm, each ending in a 2x2 max-pool; one linear layer as head."""
    channels, stages = image_channels("vgg", inputs), []
    for convolutions, factor in zip(VGG[depth], (1, 2, 4, 8, 8), strict=True):
        layers: list[nn.Module] = []
        for _ in range(convolutions):
            layers += [conv(channels, factor * width), nn.BatchNorm2d(factor * width), nn.ReLU()]
            channels = factor * width
        stages.append(nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))  # ceil: sides below 32 end at 1
    return Net(stages, average(), head(channels, classes))


def resnet(
    inputs: tuple[int, ...], classes: int, depth: int, width: int | None = None, kernel: int = 3, stem: int = 3
) -> Net:
    """A stem and three stages of (depth - 2) / 6 blocks with parameter-free shortcuts (option A of the paper).

    Depth 18 has four stages of two blocks, and 1x1 projections where the shape changes. `width`: channels of the first
    stage, default 16, or 64 for depth 18. `kernel`, `stem`: sides of the kernels in the blocks and in the stem.
    """
    wide = depth == 18
    width = width or (64 if wide else 16)
    blocks, stage_count = (2, 4) if wide else ((depth - 2) // 6, 3)
    stages = [nn.Sequential(*rectified(image_channels("resnet", inputs), width, stem, batch_norm=True))]
    channels = width
    for i in range(stage_count):
        out = width * 2**i
        first = Residual(channels, out, kernel, stride=2 if i else 1, project=wide)
        stages.append(nn.Sequential(first, *(Residual(out, out, kernel) for _ in range(blocks - 1))))
        channels = out
    return Net(stages, average(), head(channels, classes))


def airbench(inputs: tuple[int, ...], classes: int, widths: Sequence[int]) -> Net:
    """A 2x2 convolution of two filters for each value of its patch, then blocks that each halve the side; a small head.

    Jordan 2024, arXiv 2404.00498. Batch norms have biases and no learnt scale, and the head's logits are divided by 9.
    Weights start as torch's layers do: what else the paper does to them, the strategies `whitening` and `dirac` do.
    """
    channels, side = image_channels("airbench", inputs), min(inputs[1:]) - 1
    if side >> len(widths) < 1:
        raise PlanError(
            f"model airbench halves the side {len(widths)} times, so it needs images of {1 + 2 ** len(widths)} pixels "
            f"a side or more, the data have shape {inputs}: take fewer widths"
        )
    stages = [nn.Sequential(nn.Conv2d(channels, 8 * channels, 2), nn.GELU())]
    for before, width in pairwise((8 * channels, *widths)):
        first = (_plain_conv(before, width), nn.MaxPool2d(2), _shift_norm(width), nn.GELU())
        stages.append(nn.Sequential(*first, _plain_conv(width, width), _shift_norm(width), nn.GELU()))
    pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    return Net(stages, pool, nn.Sequential(nn.Linear(widths[-1], classes, bias=False), Scale(1 / 9)))


def _plain_conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, bias=False)


def _shift_norm(features: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(features, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class Scale(nn.Module):
    """Times a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Residual(nn.Module):
    """relu(shortcut(x) + branch(x)) with two convolutions in the branch."""

    def __init__(self, channels: int, out: int, kernel: int = 3, stride: int = 1, project: bool = False):
        super().__init__()
        last = nn.BatchNorm2d(out)
        nn.init.zeros_(last.weight)
        first = (conv(channels, out, stride, kernel), nn.BatchNorm2d(out), nn.ReLU())
        self.branch = nn.Sequential(*first, conv(out, out, 1, kernel), last)
        self.shortcut = _shortcut(channels, out, stride, project)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.branch(x))


class Subsample(nn.Module):
    """The parameter-free shortcut: every `stride`-th pixel, zeros for the new channels."""

    def __init__(self, stride: int, extra: int):
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def _shortcut(channels: int, out: int, stride: int, project: bool) -> nn.Module:
    if channels == out and stride == 1:
        return nn.Identity()
    if project:
        return nn.Sequential(conv(channels, out, stride, kernel=1), nn.BatchNorm2d(out))
    return Subsample(stride, out - channels)


def imported(inputs: tuple[int, ...], classes: int, path: str) -> Net:
    """The user's own network: `path` is package.module:function, called as function(inputs, classes)."""
    module_name, _, function = path.partition(":")
    try:
        build = getattr(importlib.import_module(module_name), function)
    except AttributeError:
        raise PlanError(f"model import {path}: {module_name} has no function {function}") from None
    except Exception as error:  # the user's module may raise anything
        hint = "; put its folder on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        raise PlanError(f"model import {path}: cannot import {module_name}: {error!r}{hint}") from error
    net = build(inputs, classes)
    if not isinstance(net, nn.Module):
        raise PlanError(f"model import {path}: returned {type(net).__name__}, expected a torch.nn.Module")
    return net if isinstance(net, Net) else Net([net])


BUILDERS: dict[str, Callable[..., Net]] = {
    "mlp": mlp, "small_cnn": small_cnn, "resnet": resnet, "vgg": vgg, "airbench": airbench, "import": imported,
    "plain_cnn": plain_cnn, "overfeat": overfeat, "small_overfeat": small_overfeat, "alexnet": alexnet,
    "convnext": convnext,
}  # fmt: skip
