"""Local losses: what a module is told by a small network of its own, above it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from strategies.parts.batch_maps import soft

Head: TypeAlias = Literal["linear", "pooled", "deep"]
SHRINK, LAST = 4, 2  # of the deep head: the image's side becomes a quarter, and then this


class Auxiliary(nn.Module):
    """`head`: (n, ...) activations -> (n, classes) logits. `features`: activations -> what similarity is taken of."""

    def __init__(self, shape: tuple[int, ...], classes: int, head: Head | None, similar: bool):
        super().__init__()
        self.classes = classes
        if head:
            self.head = HEADS[head](shape, classes)
        if similar:
            self.features = _features(shape)

    def dissimilarity(self, h: Tensor, y: Tensor) -> Tensor:
        """() mean squared difference between similarities of features and of labels, over all pairs of examples."""
        z = _spread(self.features(h))
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return (similarities(z) - similarities(soft(y, self.classes, z))).square().mean()


def _spread(z: Tensor) -> Tensor:
    """(n, d): of a map its standard deviation over positions, for each channel; of a single position its value."""
    return z.flatten(2).std(2) if z.ndim == 4 and z[0, 0].numel() > 1 else z.flatten(1)


def similarities(z: Tensor) -> Tensor:
    """(n, n) cosines between the rows of (n, d), each less its mean."""
    unit = nn.functional.normalize(z - z.mean(1, keepdim=True), dim=1)
    return unit @ unit.T


def _features(shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 3:
        return nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), math.prod(shape), bias=False))


def _linear(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


def _pooled(shape: tuple[int, ...], classes: int) -> nn.Module:
    if len(shape) != 3:
        return _linear(shape, classes)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(shape[0], classes))


def _deep(shape: tuple[int, ...], classes: int) -> nn.Module:
    """MLP-SR of decoupled greedy learning: three 1x1 convolutions at a quarter of the side, three linear layers."""
    if len(shape) != 3:
        return nn.Sequential(nn.Flatten(), *_perceptron(math.prod(shape), classes))
    channels, sides = shape[0], [math.ceil(side / SHRINK) for side in shape[1:]]
    blocks = [layer for _ in range(3) for layer in _rectified(channels)]
    average = nn.AdaptiveAvgPool2d(LAST)
    wide = channels * LAST**2
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(tuple(sides)), *blocks, average, nn.Flatten(), *_perceptron(wide, classes)
    )


def _rectified(channels: int) -> list[nn.Module]:
    """Without running statistics, since the head works in training alone."""
    norm = nn.BatchNorm2d(channels, track_running_stats=False)
    return [nn.Conv2d(channels, channels, 1), norm, nn.ReLU()]


def _perceptron(width: int, classes: int) -> list[nn.Module]:
    return [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)]


HEADS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {"linear": _linear, "pooled": _pooled, "deep": _deep}
