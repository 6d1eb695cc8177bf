"""Weights moved for the time of a gradient, for methods that take it elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def displaced(weights: Sequence[Tensor], moves: Sequence[Tensor]) -> Iterator[None]:
    """`weights` plus `moves`, in place; afterwards, errors included, as they were, bit for bit."""
    import torch

    before = [w.detach().clone() for w in weights]
    try:
        with torch.no_grad():
            for w, move in zip(weights, moves, strict=True):
                w.add_(move)
        yield
    finally:
        restore(weights, before)


def restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Sets each tensor to its value, in place."""
    import torch

    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
