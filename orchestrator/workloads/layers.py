"""Layers as the networks of recipes have them: He normal before a ReLU, zero biases."""

from __future__ import annotations

from typing import Literal

from torch import nn

from strategies.contract import PlanError


def conv(channels: int, out: int, stride: int = 1, kernel: int = 3, bias: bool = False) -> nn.Conv2d:
    """Padded so that stride 1 keeps the side, which `kernel` being odd makes possible."""
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def rectified(channels: int, out: int, kernel: int, batch_norm: bool) -> list[nn.Module]:
    """A convolution, perhaps a batch norm in place of its biases, a ReLU."""
    norm = [nn.BatchNorm2d(out)] if batch_norm else []
    return [conv(channels, out, kernel=kernel, bias=not batch_norm), *norm, nn.ReLU()]


def linear(size: int, out: int, nonlinearity: Literal["relu", "linear"] = "relu") -> nn.Linear:
    linear = nn.Linear(size, out)
    nn.init.kaiming_normal_(linear.weight, nonlinearity=nonlinearity)
    nn.init.zeros_(linear.bias)
    return linear


def head(size: int, classes: int) -> nn.Linear:
    return linear(size, classes, "linear")  # no ReLU behind it, so no factor 2


def average() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def image_channels(name: str, inputs: tuple[int, ...]) -> int:
    if len(inputs) != 3:
        raise PlanError(f"model {name} needs images (channels, height, width), the data have shape {inputs}: use mlp")
    return inputs[0]
