"""Sums of a a^T over the input rows of a layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.grad import conv2d_weight

from strategies.curvature.layers import ConvLayer, LinearLayer

LARGEST = 2**26  # numbers in one matrix of rows


def square(rows: Tensor) -> Tensor:
    """(groups, n, d) -> (groups, d, d): the sum of r r^T, in float32 at least."""
    rows = widened(rows)
    return rows.mT @ rows


def gram(layer: LinearLayer | ConvLayer, x: Tensor) -> Tensor:
    """(groups, d_in, d_in): the sum of a a^T over all input rows of a call."""
    if isinstance(layer, ConvLayer) and slides(layer):
        return _by_shifts(widened(x), layer.bias is not None)[None]
    _, _, into = layer.sizes
    high, wide = x.shape[-2:] if x.ndim == 4 else (1, 1)
    return sum_of([square(layer.inputs(part).flatten(1, 2)) for part in chunks(x, into * high * wide)])


def chunks(t: Tensor, size: int) -> tuple[Tensor, ...]:
    """Examples of `t` in parts, if each will take `size` numbers, so that no part takes more than LARGEST of them."""
    return t.split(max(1, LARGEST // size))


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """At least one, of the same shape."""
    first, *others = tensors
    return functools.reduce(torch.add, others, first)


def widened(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def slides(layer: ConvLayer) -> bool:
    """Whether a convolution is the plain 3 x 3 one that keeps the size of the map."""
    conv = layer.module
    ones = conv.stride == conv.dilation == (1, 1) and conv.groups == 1
    return conv.kernel_size == (3, 3) and ones and conv.padding in ((1, 1), "same") and conv.padding_mode == "zeros"


def _by_shifts(x: Tensor, biased: bool) -> Tensor:
    """With a bias, a channel of ones: what the middle tap sees of it is always one."""
    if not biased:
        return from_shifts(x)
    c = x.shape[1]
    products = from_shifts(torch.cat([x, torch.ones_like(x[:, :1])], 1))
    kept = [tap * (c + 1) + channel for tap in range(9) for channel in range(c)] + [4 * (c + 1) + c]
    return products[kept][:, kept]


def from_shifts(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (9 c, 9 c): the sum of a a^T over the rows of a 3 x 3 convolution that keeps the size of the map.

    Without gathered rows: taps i and j of the kernel see the image shifted by j - i, so the 81 products of taps are the image's
    25 correlations with itself, less what lies beyond an edge of what the taps see. That counts only for two taps in the same
    row (column) of the kernel: with others, one of the two is in the padding there.
    """
    c = x.shape[1]
    plane = correlation(x)  # (5, 5, c, c) by shift
    bottom, top = (correlation(x[:, :, edge], down=0)[0] for edge in (slice(-1, None), slice(1)))  # along it: (5, c, c)
    right, left = (correlation(x[..., edge], across=0)[:, 0] for edge in (slice(-1, None), slice(1)))
    products = plane.new_empty(3, 3, 3, 3, c, c)
    for i in range(3):
        for j in range(3):
            products[i, j] = plane[2 - i : 5 - i, 2 - j : 5 - j]
    for i, edge, side in ((0, -1, bottom), (2, 0, top)):
        for j in range(3):
            products[i, j, i] -= side[2 - j : 5 - j]
            products[j, i, :, i] -= (right if i == 0 else left)[2 - j : 5 - j]
        for j, other in ((0, -1), (2, 0)):
            corner = x[:, :, edge, other]
            products[i, j, i, j] += corner.mT @ corner
    return products.permute(0, 1, 4, 2, 3, 5).reshape(9 * c, 9 * c)


def correlation(x: Tensor, down: int = 2, across: int = 2) -> Tensor:
    """(n, c, h, w) -> (2 down + 1, 2 across + 1, c, c): the sum over the plane of x[u] x[u + shift]^T, by shift, from (-down,
    -across) on."""
    c = x.shape[1]
    below = pad(x, (0, 0, 0, down)) if down else x
    weight = conv2d_weight(below, (c, c, down + 1, 2 * across + 1), x, padding=(0, across))
    later = weight.permute(2, 3, 0, 1)  # shifts by 0, 1, .. rows; by -1, .. it is the transpose of the opposite shift
    return torch.cat([later.flip(0, 1).mT[:down], later])
