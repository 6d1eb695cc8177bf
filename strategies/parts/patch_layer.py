"""The layer of `patch_affine`: a convolution as an affine layer over the patches that the positions of its output see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import fold, pad

from strategies.contract import PlanError
from strategies.curvature.layers import ConvLayer
from strategies.net import Net
from strategies.parts.layers import convolutions

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Patches:
    """How patches are made and seen; see the options of `patch_affine`."""

    mode: Literal["expand", "sample", "reduce"]
    positions: int
    count: Literal["images", "positions"]
    chunk: int


class AffineOverPatches(torch.autograd.Function):
    """out = P W', x's patches P being rows: x (n, c, h, w), weight (o, c / groups, kh, kw) -> (n, o, h', w').

    Patches are made some images at a time and not kept: the backward pass makes them again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: ConvLayer) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        matrix = _matrix(layer, weight)
        outputs = [_forward(layer, part, matrix) for part in parts(layer, x)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), layer = ctx.saved_tensors, ctx.layer
        matrix = _matrix(layer, weight)
        of_matrix, of_x = torch.zeros_like(matrix), []
        images = parts(layer, x)
        for part, part_grad in zip(images, grad.split(len(images[0])), strict=True):
            rows = layer.outputs(part_grad).flatten(1, 2)
            if ctx.needs_input_grad[0]:
                of_x.append(_to_input(layer, part, rows @ matrix))
            if ctx.needs_input_grad[1]:
                of_matrix += rows.mT @ _rows(layer, layer.windows(part).flatten(1, 2)).flatten(1, 2)
        of_weight = layer.unrows(of_matrix.flatten(0, 1)) if ctx.needs_input_grad[1] else None
        return torch.cat(of_x) if of_x else None, of_weight, None


def _matrix(layer: ConvLayer, weight: Tensor) -> Tensor:
    """(groups, d_out, d_in)"""
    rows = layer.rows(weight)
    return rows.reshape(layer.groups, -1, rows.shape[1])


def _rows(layer: ConvLayer, patches: Tensor) -> Tensor:
    """(n, t, kh, kw, c) -> (groups, n, t, d_in) in the order of `ConvLayer.inputs`, without the bias' one."""
    grouped = patches.unflatten(-1, (layer.groups, -1)).permute(4, 0, 1, 2, 3, 5)
    return grouped.reshape(*grouped.shape[:3], -1)


def _forward(layer: ConvLayer, x: Tensor, matrix: Tensor) -> Tensor:
    windows = layer.windows(x)
    n, high, wide = windows.shape[:3]
    out = _rows(layer, windows.flatten(1, 2)).flatten(1, 2) @ matrix.mT
    return out.unflatten(1, (n, high, wide)).permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2)


def _to_input(layer: ConvLayer, x: Tensor, rows: Tensor) -> Tensor:
    """The transpose of making patches: gradients (groups, n t, d_in) of the patches of `x` -> that of `x`."""
    conv = layer.module
    with torch.enable_grad():
        inside = x.detach().requires_grad_()
        padded = layer.padded(inside)
    kernel: tuple[int, int] = conv.kernel_size  # type: ignore[assignment]
    columns = rows.unflatten(2, (*kernel, -1)).unflatten(1, (len(x), -1)).permute(1, 0, 5, 3, 4, 2)
    size = padded.shape[2:]
    spread = fold(columns.flatten(1, 4), size, kernel, conv.dilation, 0, conv.stride)
    return torch.autograd.grad(padded, inside, spread)[0]


class PatchAffine(nn.Conv2d):
    """A Conv2d, computed as an affine layer over patches; all names are the convolution's."""

    patches: Patches

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() != 4:  # one image without a batch
            return super()._conv_forward(input, weight, bias)
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        out = AffineOverPatches.apply(input, weight, ConvLayer("", self))
        return out if bias is None else out + bias.view(-1, 1, 1)


def parts(layer: ConvLayer, x: Tensor) -> tuple[Tensor, ...]:
    """The images (n, c, h, w), so many at a time that their patches fit into the chunk, but one at least."""
    patches: Patches = layer.module.patches  # type: ignore[assignment]
    one = layer.windows(x[:1]).numel() * x.element_size()
    return x.split(max(1, patches.chunk * MIB // max(one, 1)))


@dataclass(frozen=True, slots=True)
class Rows:
    """What factors see of one call of a layer, or of a part of it."""

    inputs: Tensor  # (m, d_in), with the bias' one
    outputs: Tensor  # (m, d_out)
    samples: float  # that these rows count for in a factor's memory


def seen(layer: ConvLayer, x: Tensor, grad: Tensor, seed: int) -> Iterator[Rows]:
    """Rows of the input (n, c, h, w) and of the output's gradient of a `PatchAffine`; groups are positions of their own."""
    patches: Patches = layer.module.patches  # type: ignore[assignment]
    images = parts(layer, x)
    for part, part_grad in zip(images, grad.split(len(images[0])), strict=True):
        rows, outputs = _picked(layer, patches, part, layer.outputs(part_grad), seed)
        inputs = rows if layer.bias is None else pad(rows, (0, 1), value=1.0)
        samples = len(part) if patches.count == "images" else len(part) * outputs.shape[2]
        yield Rows(inputs.flatten(0, 2), outputs.flatten(0, 2), samples)


def _picked(layer: ConvLayer, patches: Patches, x: Tensor, outputs: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(groups, n, t, d) of both sides at the positions that the mode takes: all, some, or the mean patch."""
    windows = layer.windows(x)
    high, wide = windows.shape[1:3]
    if patches.mode == "reduce":
        return _rows(layer, windows.mean((1, 2))[:, None]), outputs.sum(2, keepdim=True)
    if patches.mode == "sample":
        drawn = torch.randperm(high * wide, generator=torch.Generator().manual_seed(seed))[: patches.positions]
        chosen = drawn.sort().values.to(x.device)
        return _rows(layer, windows[:, chosen // wide, chosen % wide]), outputs[:, :, chosen]
    return _rows(layer, windows.flatten(1, 2)), outputs


def replace(net: Net, patches: Patches, largest: int | None) -> Net:
    """The net with its convolutions by patches of `largest` values at most. Raises PlanError if it has no convolution."""
    found = convolutions(net)
    if not found:
        raise PlanError("patch_affine replaces convolutions, but the network has none: choose another model")
    for conv in found:
        if type(conv) is nn.Conv2d and (largest is None or conv.weight[0].numel() <= largest):
            conv.__class__ = PatchAffine
            conv.patches = patches  # type: ignore[assignment]
    return net
