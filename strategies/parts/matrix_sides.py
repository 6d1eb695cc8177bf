"""What Shampoo and SOAP share: weights as matrices, and running means of G G' and G'G of their gradients G, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def as_matrix(t: Tensor) -> Tensor:
    """(rows, ...) -> (rows, columns): a convolution has a row per output channel."""
    return t.reshape(len(t), -1)


def sides(g: Tensor, largest: int) -> list[str]:
    """Of a (rows, columns) matrix: "left" and "right", where rows and columns are `largest` at most."""
    return [side for side, size in zip(("left", "right"), g.shape, strict=True) if size <= largest]


def collect(state: dict[str, Any], g: Tensor, side: str, beta: float) -> Tensor:
    """The running mean of G G', or of G'G on the right, with this gradient's share of 1 - beta; it starts from 0."""
    gram = g @ g.T if side == "left" else g.T @ g
    mean: Tensor = state.setdefault(side, gram.new_zeros(gram.shape)).lerp_(gram, 1 - beta)
    return mean


def eigen(mean: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) eigenvalues, at least 0, smallest first, and (n, n) eigenvectors in columns; of what is not finite, any.

    It would raise, but a trial that has diverged ends by its loss.
    """
    import torch

    values, vectors = torch.linalg.eigh(mean.nan_to_num(0, 0, 0))
    return values.clamp(min=0), vectors


def between(factors: Mapping[str, Tensor], g: Tensor) -> Tensor:
    """left g right; a side without a factor is left as it is."""
    g = factors["left"] @ g if "left" in factors else g
    return g @ factors["right"] if "right" in factors else g
