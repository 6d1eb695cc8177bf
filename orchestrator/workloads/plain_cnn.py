"""Plain convolutional networks written stage by stage: CNN 1 to 8 of Griswold's study of partial learning, and their like.

A stage is a text such as `C3 C1 P`: a 3x3 convolution, a 1x1 convolution, each keeping the side and with a ReLU behind it, and
a 2x2 max-pool. The head is one linear layer on all features of the last stage, so that each stage could be the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from strategies.contract import PlanError
from strategies.net import Net


def plain_cnn(inputs: tuple[int, ...], classes: int, stages: Sequence[str], width: int) -> Net:
    """`width`: channels of each convolution. Weights He normal, biases zero. Raises PlanError for other data than images."""
    if len(inputs) != 3:
        raise PlanError(
            f"model plain_cnn needs images (channels, height, width), the data have shape {inputs}: use mlp"
        )
    channels, built = inputs[0], []
    for text in stages:
        layers: list[nn.Module] = []
        for layer in text.split():
            if layer == "P":
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            else:
                layers += [_started(nn.Conv2d(channels, width, int(layer[1:]), padding="same"), "relu"), nn.ReLU()]
                channels = width
        built.append(nn.Sequential(*layers))
    with torch.no_grad():
        features = math.prod(nn.Sequential(*built)(torch.zeros(1, *inputs)).shape)
    return Net(built, nn.Flatten(), _started(nn.Linear(features, classes), "linear"))


def _started(layer: nn.Conv2d | nn.Linear, nonlinearity: str) -> nn.Module:
    nn.init.kaiming_normal_(layer.weight, nonlinearity=nonlinearity)  # type: ignore[arg-type]
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
