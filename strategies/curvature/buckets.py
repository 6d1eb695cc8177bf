"""Many tensors as one flat one for one collective; of symmetric matrices only the upper triangles travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a tensor, or of a stack of symmetric matrices (..., d, d)."""

    sizes: tuple[int, ...]
    symmetric: bool = False

    @property
    def numel(self) -> int:
        """Numbers that travel."""
        count = 1
        for size in self.sizes:
            count *= size
        return count // self.sizes[-1] * (self.sizes[-1] + 1) // 2 if self.symmetric else count


def pack(tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> Tensor:
    """One flat tensor."""
    return torch.cat([_flat(t, shape) for t, shape in zip(tensors, shapes, strict=True)])


def unpack(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The inverse of `pack`. What is not symmetric is a view."""
    parts = flat.split([shape.numel for shape in shapes])
    return [_whole(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _flat(t: Tensor, shape: Shape) -> Tensor:
    return (_half(t) if shape.symmetric else t).reshape(-1)


def _whole(part: Tensor, shape: Shape) -> Tensor:
    if not shape.symmetric:
        return part.view(shape.sizes)
    d = shape.sizes[-1]
    return _mirrored(part.view(*shape.sizes[:-2], -1), d - d // 2, d // 2)


def _half(t: Tensor) -> Tensor:
    """(..., d, d) -> (..., d (d + 1) / 2), without indices as large as the matrix (rectangular full packed, LAPACK note 199).

    Of the blocks [[A, B^T], [B, C]], the lower triangle of A and the upper one of C fill a rectangle.
    """
    d = t.shape[-1]
    low = d // 2
    high = d - low
    corner = t.new_zeros(*t.shape[:-2], high, low + 1)
    corner[..., :high] = t[..., :high, :high].tril()
    corner[..., :low, 1:] += t[..., high:, high:].triu()
    return torch.cat([corner.flatten(-2), t[..., high:, :high].flatten(-2)], -1)


def _mirrored(half: Tensor, high: int, low: int) -> Tensor:
    """The inverse of `_half`, for blocks of sides `high` and `low`."""
    corner, below = half.split([high * (low + 1), low * high], -1)
    corner, below = corner.unflatten(-1, (high, low + 1)), below.unflatten(-1, (low, high))
    first, last = corner[..., :high].tril(), corner[..., :low, 1:].triu()
    first, last = first + first.tril(-1).mT, last + last.triu(1).mT
    return torch.cat([torch.cat([first, below.mT], -1), torch.cat([below, last], -1)], -2)
