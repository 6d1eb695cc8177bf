"""Convolution on small maps as one matrix product over gathered patches, forward and both gradients.

Where the output map is small and channels are many, libraries keep a processor's matrix units busier with a product than
with a convolution. Which convolutions gain by it is a matter of the machine: `orchestrator.tuning` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """(n, c, h, w) -> (n, h', w', kh, kw, c): what each output position of a convolution sees."""
    rows, columns = padding
    x = pad(x.permute(0, 2, 3, 1), (0, 0, columns, columns, rows, rows))
    n, height, width, channels = x.shape
    high, wide = (height - kernel[0]) // stride[0] + 1, (width - kernel[1]) // stride[1] + 1
    a, b, c, d = x.stride()
    return x.as_strided((n, high, wide, *kernel, channels), (a, b * stride[0], c * stride[1], b, c, d))


def fold(
    p: Tensor, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The transpose of `patches`: (n, h', w', kh, kw, c) -> (n, c, h, w), summed where patches overlap."""
    n, high, wide, channels = p.shape[0], p.shape[1], p.shape[2], p.shape[5]
    x = p.new_zeros(n, size[0] + 2 * padding[0], size[1] + 2 * padding[1], channels)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            x[:, i : i + stride[0] * high : stride[0], j : j + stride[1] * wide : stride[1]] += p[:, :, :, i, j]
    inside = x[:, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
    return inside.permute(0, 3, 1, 2)


class PatchConvolution(torch.autograd.Function):
    """`torch.nn.functional.conv2d` for one group, undilated: x (n, c, h, w), weight (o, c, kh, kw) -> (n, o, h', w')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
        kernel = weight.shape[2:]
        gathered = patches(x, kernel, stride, padding)
        n, high, wide = gathered.shape[:3]
        gathered = gathered.reshape(n * high * wide, -1)
        ctx.save_for_backward(gathered, weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        out = gathered @ _matrix(weight).t()
        return out.view(n, high, wide, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gathered, weight = ctx.saved_tensors
        rows = grad.permute(0, 2, 3, 1).reshape(len(gathered), -1)
        of_x = _to_input(ctx, grad, rows, weight) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            out, channels, *kernel = weight.shape
            of_weight = (rows.t() @ gathered).view(out, *kernel, channels).permute(0, 3, 1, 2)
        return of_x, of_weight, None, None


def _matrix(weight: Tensor) -> Tensor:
    """(o, c, kh, kw) -> (o, kh kw c); no copy where the weight is channels-last."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _to_input(ctx: Any, grad: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the input: with stride 1 itself a convolution, of the output's gradient with the turned kernel."""
    (n, channels, *size), kernel = ctx.shape, weight.shape[2:]
    around = tuple(k - 1 - p for k, p in zip(kernel, ctx.padding, strict=True))
    if ctx.stride == (1, 1) and min(around) >= 0:
        gathered = patches(grad, kernel, (1, 1), around).reshape(n * size[0] * size[1], -1)
        turned = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(-1, channels)
        return (gathered @ turned).view(n, *size, channels).permute(0, 3, 1, 2)
    spread = (rows @ _matrix(weight)).view(n, *grad.shape[2:], *kernel, channels)
    return fold(spread, size, kernel, ctx.stride, ctx.padding)


class PatchConv2d(nn.Conv2d):
    """A Conv2d, computed by patches."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() != 4:  # one image without a batch
            return super()._conv_forward(input, weight, bias)
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        out = PatchConvolution.apply(input, weight, self.stride, self.padding)
        return out if bias is None else out + bias.view(-1, 1, 1)


def can(module: nn.Module) -> bool:
    """Whether a module is a plain convolution of one group, undilated, padded with zeros, wider than one pixel."""
    if type(module) is not nn.Conv2d or isinstance(module.padding, str) or module.padding_mode != "zeros":
        return False
    return module.groups == 1 and module.dilation == (1, 1) and max(module.kernel_size) > 1


def by_patches(conv: nn.Module) -> None:
    """Lets a convolution for which `can` holds go by patches: its names, weights, hooks and holders stay as they are."""
    conv.__class__ = PatchConv2d
