"""Inverses of damped Kronecker products, and what they make of a gradient U = (G (x) A + damping)^-1 grad.

Factors A (groups, d_in, d_in) and G (groups, d_out, d_out) are symmetric and positive semi-definite; gradients are (groups,
d_out, d_in). Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 1e8  # of pi


def balance(a: Tensor, g: Tensor) -> Tensor:
    """(groups,) pi = sqrt((tr A / d_in) / (tr G / d_out)): shares the damping out between the factors.

    Bounded, since one of them may be zero: that of a layer before a zero scale has no gradient at first.
    """
    means = [f.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(f.dtype).tiny).sqrt() for f in (a, g)]
    return (means[0] / means[1]).clamp(1 / MOST, MOST)


def factored(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(A + pi sqrt(damping))^-1, (G + sqrt(damping) / pi)^-1, by Cholesky; not a number where a factor is singular."""
    pi = balance(a, g)
    return inverse(a, pi * damping**0.5), inverse(g, damping**0.5 / pi)


def inverse(factor: Tensor, damping: Tensor) -> Tensor:
    """(factor + damping)^-1 of (groups, d, d), with a damping per group; not a number where that has no Cholesky root."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    root, failed = torch.linalg.cholesky_ex(factor + damping[:, None, None] * eye)
    bad = (failed != 0)[:, None, None]
    return torch.cholesky_inverse(torch.where(bad, eye, root)).masked_fill_(bad, torch.nan)


def eigenbasis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (groups, d), at least 0, and eigenvectors (groups, d, d) in columns."""
    values, vectors = torch.linalg.eigh(
        factor.nan_to_num(0, 0, 0)
    )  # it would raise, but a diverged trial ends by its loss
    return values.clamp_min(0), vectors


def by_factors(grad: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """G^-1 grad A^-1, given the inverses."""
    return g @ grad @ a


def by_basis(grad: Tensor, a: Tensor, g: Tensor, scale: Tensor, damping: float) -> Tensor:
    """Given eigenvectors of A and G, and the curvature (groups, d_out, d_in) along their products."""
    return g @ ((g.mT @ grad @ a) / (scale + damping)) @ a.mT
