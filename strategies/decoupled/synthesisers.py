"""Small networks that guess the gradient of the loss by a module's output, from this output and, if they may, the label.

All begin at exactly zero: the last layer's weight and bias are zero, so that modules do not move before something is learnt.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from strategies.contract import PlanError
from strategies.parts.batch_maps import soft

if TYPE_CHECKING:
    from strategies.decoupled.synthetic import Guess

HIDDEN, KERNEL = 1024, 5  # of the published networks: units of fully connected ones, side of convolutions
RANK = 4  # channels to one of a low-rank synthesiser's


class Synthesiser(nn.Module):
    """(n, ...) activations, labels -> (n, ...) gradients. A label's own term is added to what the first layer makes."""

    def __init__(self, first: nn.Module, width: int, rest: nn.Module, classes: int | None):
        super().__init__()
        self.first, self.rest = first, rest
        self.label = None if classes is None else nn.Linear(classes, width, bias=False)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        out = self.first(h)
        if self.label is not None:
            term = self.label(soft(y, self.label.in_features, h))
            out = out + term.view(*term.shape, *[1] * (out.ndim - 2))
        guess: Tensor = self.rest(out)
        return guess.expand_as(h)


class Affine(nn.Module):
    """A scale and a shift for each channel."""

    def __init__(self, channels: int, spatial: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, *[1] * spatial))
        self.bias = nn.Parameter(torch.zeros(channels, *[1] * spatial))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.weight + self.bias


def input_synthesiser(inputs: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module:
    """From the network's inputs to a guess of activations of one shape: linear, for images a convolution."""
    if len(inputs) == len(shape) == 3:
        convolution = nn.Conv2d(inputs[0], shape[0], KERNEL, padding=KERNEL // 2)
        return nn.Sequential(nn.AdaptiveAvgPool2d(shape[1:]), convolution)
    linear = nn.Linear(math.prod(inputs), math.prod(shape))
    return nn.Sequential(nn.Flatten(), linear, nn.Unflatten(1, shape))


def synthesiser(guess: Guess, shape: tuple[int, ...], classes: int) -> Synthesiser:
    """For activations of one shape: (channels, h, w), or vectors."""
    if len(shape) not in (1, 3):
        raise PlanError(
            f"synthetic_gradient guesses gradients of vectors and images, but at a cut examples have shape {shape}"
        )
    channels, image = shape[0], len(shape) == 3
    known = classes if guess.label else None
    if guess.kind == "affine":
        made = Synthesiser(Affine(channels, len(shape) - 1), channels, nn.Identity(), known)
    elif guess.kind == "linear":
        made = Synthesiser(_layer(channels, channels, image), channels, nn.Identity(), known)
    elif guess.kind == "pooled":
        average = nn.AdaptiveAvgPool2d(1) if image else nn.Identity()
        made = Synthesiser(nn.Sequential(average, _layer(channels, channels, image)), channels, nn.Identity(), known)
    elif guess.kind == "low_rank":
        width = guess.hidden or -(-channels // RANK)
        made = Synthesiser(_layer(channels, width, image), width, _layer(width, channels, image), known)
    else:
        made = _deep(channels, guess.hidden or (channels if image else HIDDEN), image, known)
    _begin_at_zero(made)
    return made


def _deep(channels: int, width: int, image: bool, classes: int | None) -> Synthesiser:
    """As published: two hidden layers with batch norm."""
    kernel = KERNEL if image else 1
    last = _layer(width, channels, image, kernel)
    rest = nn.Sequential(_rectified(width, image), _layer(width, width, image, kernel), _rectified(width, image), last)
    return Synthesiser(_layer(channels, width, image, kernel), width, rest, classes)


def _layer(channels: int, out: int, image: bool, kernel: int = 1) -> nn.Module:
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2) if image else nn.Linear(channels, out)


def _rectified(width: int, image: bool) -> nn.Module:
    """Without running statistics, since a synthesiser works in training alone."""
    norm = nn.BatchNorm2d if image else nn.BatchNorm1d
    return nn.Sequential(norm(width, track_running_stats=False), nn.ReLU())


def _begin_at_zero(made: Synthesiser) -> None:
    """The last layer; where it is the first, the label's term is part of it."""
    alone = isinstance(made.rest, nn.Identity)
    layers = [m for m in (made.first if alone else made.rest).modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1:]
    for layer in [*layers, *([made.label] if alone and made.label else [])]:
        for p in layer.parameters():
            nn.init.zeros_(p)
