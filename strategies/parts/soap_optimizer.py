"""The optimizer of `soap`, for weight matrices alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from strategies.parts.matrix_sides import as_matrix, between, collect, eigen, sides

NULL = 1e-6  # eigenvalue, over the largest one, below which a direction counts as without gradients


class SoapMatrices(Optimizer):
    """AdamW in eigenbases that turn every `every` steps. Groups have `weight_decay`; the rate is set at each step."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        statistics_beta: float,
        every: int,
        largest: int,
    ):
        self.betas, self.eps = betas, eps
        self.statistics_beta, self.every, self.largest = statistics_beta, every, largest
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, as_matrix(p.grad), group)

    def _step(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        taken = sides(g, self.largest)
        if not state:
            self._begin(state, g, taken)
            if taken:
                return
        state["steps"] += 1
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(self._direction(state, g, taken).view(p.shape), alpha=group["lr"])
        for side in taken:
            mean = collect(state, g, side, self.statistics_beta)
            if state["steps"] % self.every == 0:
                turn(state, mean, side)

    def _begin(self, state: dict[str, Any], g: Tensor, taken: list[str]) -> None:
        state |= {"steps": 0, "mean": g.new_zeros(g.shape), "squares": g.new_zeros(g.shape)}
        for side in taken:
            state[f"{side}_basis"] = eigenbasis(collect(state, g, side, self.statistics_beta))

    def _direction(self, state: dict[str, Any], g: Tensor, taken: list[str]) -> Tensor:
        """AdamW's, in the eigenbases and back; the moments in `state` move on."""
        (beta1, beta2), steps = self.betas, state["steps"]
        bases = {side: state[f"{side}_basis"] for side in taken}
        there = {side: basis.T if side == "left" else basis for side, basis in bases.items()}
        back = {side: factor.T for side, factor in there.items()}
        mean = between(there, state["mean"].lerp_(g, 1 - beta1)) / (1 - beta1**steps)
        squares = state["squares"].lerp_(between(there, g).square(), 1 - beta2) / (1 - beta2**steps)
        return between(back, mean / (squares.sqrt() + self.eps))


def eigenbasis(mean: Tensor) -> Tensor:
    """(n, n) orthonormal columns: eigenvectors by falling eigenvalue, then what is left of the axes where there is none.

    A first gradient has few directions; its null space has no basis of its own, and rounding must not choose one.
    """
    values, vectors = eigen(mean)
    found = vectors[:, values > NULL * values[-1]].flip(1)
    axes = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    return orthonormal(torch.cat([found, axes], 1))


def turn(state: dict[str, Any], mean: Tensor, side: str) -> None:
    """One step of power iteration of the side's basis, by falling eigenvalue; the second moment is ordered likewise.

    Directions without gradients stay as they are, where the bare product would leave their choice to rounding.
    """
    basis = state[f"{side}_basis"]
    product = mean @ basis
    values = (basis * product).sum(0)
    order = values.argsort(descending=True)
    state[f"{side}_basis"] = orthonormal((product + NULL * values.max() * basis)[:, order])
    state["squares"] = state["squares"].index_select(0 if side == "left" else 1, order)


def orthonormal(columns: Tensor) -> Tensor:
    """(n, m) -> (n, n) made of the columns one after the other, in memory as a checkpoint gives it back."""
    return torch.linalg.qr(columns).Q.contiguous()
