"""Inverses of damped Kronecker products, and what they make of a gradient U = (G (x) A + damping)^-1 grad.

Factors A (groups, d_in, d_in) and G (groups, d_out, d_out) are symmetric and positive semi-definite; gradients are (groups,
d_out, d_in). Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance(a: Tensor, g: Tensor) -> Tensor:
    """(groups,) pi = sqrt((tr A / d_in) / (tr G / d_out)): shares the damping out between the factors."""
    means = [f.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(f.dtype).tiny) for f in (a, g)]
    return (means[0] / means[1]).sqrt()


def factored(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(A + pi sqrt(damping))^-1, (G + sqrt(damping) / pi)^-1, by Cholesky; not a number where a factor is singular."""
    pi = balance(a, g)
    return inverse(a, pi * damping**0.5), inverse(g, damping**0.5 / pi)


def inverse(factor: Tensor, damping: Tensor) -> Tensor:
    """(factor + damping)^-1 of (groups, d, d), with a damping per group; not a number where that has no Cholesky root."""
    damped = factor + damping[:, None, None] * torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    root, failed = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_inverse(root).masked_fill_((failed != 0)[:, None, None], torch.nan)


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
