"""The online Fisher factor of NG-SGD: low rank plus scaled identity (Povey, Zhang & Khudanpur 2015, arXiv 1410.7455).

F = Q' diag(d) Q + rho I estimates S = X'X / N, the uncentred covariance of rows X (N, D), from batch to batch. All that a
batch does to a factor is in sums over its rows, so parts of it and workers add up. Constants are the authors'.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

EPSILON = 1e-10  # least d and rho
DELTA = 5e-4  # least d and rho, of the largest eigenvalue
FIRST = 3  # steps of the power iteration on the first batch


@dataclass(frozen=True, slots=True)
class Sums:
    """What a factor needs of the rows X of one batch."""

    rows: Tensor  # () N
    square: Tensor  # () |X|_F^2
    products: Tensor  # (R, D) Q X'X; or (R,) the squared norms of X Q', which `precondition` alone needs; or (D, D) X'X


@dataclass(frozen=True, slots=True)
class Factor:
    """F = Q' diag(d) Q + rho I, R being at most half of D. With R = 0 it changes nothing."""

    q: Tensor  # (R, D), rows orthonormal
    d: Tensor  # (R,) float64, > 0
    rho: Tensor  # () float64, > 0

    def dense(self) -> Tensor:
        """(D, D) F itself, in float64."""
        q = self.q.double()
        return (q.T * self.d) @ q + self.rho * torch.eye(q.shape[1], dtype=q.dtype, device=q.device)

    def trace(self) -> Tensor:
        return self.q.shape[1] * self.rho + self.d.sum()

    def shares(self, alpha: float) -> Tensor:
        """(R,) e in [0, 1): how much of each component of Q is taken away, F being smoothed by (alpha / D) tr(F) I."""
        beta = self.rho + alpha / self.q.shape[1] * self.trace()
        return 1 / (beta / self.d + 1)

    def reduce(self, matrix: Tensor, alpha: float) -> Tensor:
        """(..., D) -> the same: beta X (F + (alpha / D) tr(F) I)^-1 = X - X Q' diag(e) Q."""
        return matrix - (matrix @ self.q.T * self.shares(alpha).to(matrix.dtype)) @ self.q

    def scale(self, sums: Sums, alpha: float) -> Tensor:
        """() gamma = |X|_F / |reduce(X)|_F, which gives rows their old norm; 1 for rows of zeros."""
        e = self.shares(alpha)
        left = sums.square - ((2 * e - e.square()) * self._energies(sums)).sum()
        return torch.where(left > 0, sums.square / left, torch.ones_like(left)).sqrt()

    def _energies(self, sums: Sums) -> Tensor:
        """(R,) squared norms of the columns of X Q'."""
        return sums.products if sums.products.ndim == 1 else (sums.products * self.q.double()).sum(1)

    def updated(self, sums: Sums, eta: float | Tensor) -> Factor:
        """One step of the power iteration towards T = eta S + (1 - eta) F, whose trace F has then, where no floor acts.

        Y = Q T; its singular values and right singular vectors are the new eigenvalues d + rho and the new Q (the
        authors' eigenvalues of Y Y', without the square: rows of Q stay orthonormal, whatever the spectrum).
        """
        rank, width = self.q.shape
        if not rank or not 0 < sums.square < inf:
            return self
        y = eta / sums.rows * sums.products + (1 - eta) * (self.d + self.rho)[:, None] * self.q.double()
        trace = eta / sums.rows * sums.square + (1 - eta) * self.trace()
        _, values, q = torch.linalg.svd(y, full_matrices=False)
        values = values.maximum((1 - eta) * self.rho)
        floor = (DELTA * values.max()).clamp(min=EPSILON)
        rho = ((trace - values.sum()) / (width - rank)).maximum(floor)
        return Factor(_rows(q, self.q), (values - rho).maximum(floor), rho)


def _rows(q: Tensor, like: Tensor) -> Tensor:
    """In the dtype of `like`, row after row in memory: after a resume, products round as without one."""
    return q.to(like.dtype).contiguous()


def rank_of(width: int, limit: int) -> int:
    """R for rows of `width`: `limit` at most, and half of them."""
    return max(min(limit, (width + 1) // 2, width - 1), 0)


def start(width: int, limit: int, like: Tensor) -> Factor:
    """The factor before any batch, with Q in the dtype of `like`: row r has ones in columns r, r + R, ..., normalised."""
    rank = rank_of(width, limit)
    columns = torch.arange(width, device=like.device)
    q = (columns % max(rank, 1) == torch.arange(rank, device=like.device)[:, None]).to(like.dtype)
    q.diagonal().mul_(1.1)
    q = q / q.norm(dim=1, keepdim=True)
    tiny = torch.full((rank,), EPSILON, dtype=torch.float64, device=like.device)
    return Factor(q, tiny, torch.tensor(EPSILON, dtype=torch.float64, device=like.device))


def first(factor: Factor, sums: Sums, eta: float | Tensor) -> Factor:
    """The factor after FIRST updates on the first batch, whose `sums` hold X'X; one where rows are no more than R."""
    for _ in range(FIRST if sums.rows > len(factor.q) else 1):
        factor = factor.updated(onto(factor, sums), eta)
    return factor


def onto(factor: Factor, sums: Sums) -> Sums:
    """`sums` with X'X, as this factor needs them."""
    return Sums(sums.rows, sums.square, factor.q.double() @ sums.products)


def of_rows(x: Tensor, probe: Tensor | None, whole: bool) -> tuple[Tensor, Tensor]:
    """((), products) of rows (N, D): their square and, if `whole`, probe X'X, or X'X without a probe; else norms alone."""
    square = x.square().sum()
    if probe is None:
        return square, x.T @ x
    h = x @ probe.T
    return square, h.T @ x if whole else h.square().sum(0)


def merged(factors: list[Factor]) -> Factor:
    """The factor nearest to the mean of several of one shape, with the trace of the mean: its top components, the rest even."""
    one = factors[0]
    rank, width = one.q.shape
    if not rank:
        return one
    count = len(factors)
    stacked = torch.cat([f.q.double() * (f.d / count).sqrt()[:, None] for f in factors])
    _, values, q = torch.linalg.svd(stacked, full_matrices=False)
    top, left = values[:rank].square(), values[rank:].square().sum()
    rest = left / (width - rank)
    rho = torch.stack([f.rho for f in factors]).mean() + rest
    return Factor(_rows(q[:rank], one.q), (top - rest).clamp(min=EPSILON), rho)
