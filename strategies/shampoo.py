"""Shampoo: gradients G of weight matrices become L^-p G R^-p, p = 1/4, before SGD (Gupta et al. 2018, arXiv 1802.09568).

L and R are running means of G G' and G'G, without the bias of their start, plus `eps` times their largest eigenvalue: so the
direction does not depend on the scale of the loss. A side above `largest` is left alone, and the other one takes 2 p. Momentum
and weight decay are SGD's; biases and norm parameters are left to it. Grafting keeps the direction and takes the length of
another method's step (Anil et al. 2020, arXiv 2002.09018). Convolutions count as matrices with a row per output channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from strategies.backprop import amend
from strategies.contract import Plan, PlanError, Strategy, option
from strategies.optimizers import Sgd
from strategies.parts.layers import WholeLayers
from strategies.parts.matrix_sides import as_matrix, between, collect, eigen, sides

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from strategies.net import Net

TINY = 1e-30  # so that a gradient of zeros is divided by no zero
RMSPROP_EPS = 1e-8


@dataclass(frozen=True, slots=True)
class Shampoo(Strategy):
    beta: float = option(0.95, "share of the old statistics that stays at each step", ge=0, lt=1)
    power: float = option(0.25, "p, where both sides are taken; 0: plain SGD", ge=0, le=1)
    eps: float = option(1e-6, "added to statistics, times their largest eigenvalue", gt=0)
    every: int = option(10, "optimizer steps between computations of L^-p and R^-p", ge=1)
    largest: int = option(1024, "side of a matrix up to which it is taken", ge=1)
    graft: Literal["sgd", "rmsprop", "none"] = option(
        "sgd", "whose length each layer's step has: the gradient's, that of G / sqrt(mean of G^2), or its own"
    )

    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: amend(phase, self, updates=(WholeLayers(),), optimizer=self._optimizer))

    def _optimizer(self, old: object) -> Preconditioned:
        if not isinstance(old, Sgd):
            raise PlanError(f"shampoo changes the gradients of sgd, but the optimizer is {old}: leave one method out")
        return Preconditioned(old, self)


@dataclass(frozen=True, slots=True)
class Preconditioned:
    base: Sgd
    options: Shampoo

    def __call__(self, net: Net) -> Optimizer:
        optimizer = self.base(net)
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: self._precondition(optimizer))
        return optimizer

    def _precondition(self, optimizer: Optimizer) -> None:
        import torch

        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.ndim >= 2 and p.grad is not None:
                        step = direction(as_matrix(p.grad), optimizer.state[p], self.options)
                        p.grad.copy_(step.view(p.shape))


def direction(g: Tensor, state: dict[str, Any], options: Shampoo) -> Tensor:
    """(rows, columns) gradient -> what SGD takes for it. The statistics in `state` move on."""
    taken = sides(g, options.largest)
    steps = state["steps"] = state.get("steps", 0) + 1
    for side in taken:
        mean = collect(state, g, side, options.beta)
        if (steps - 1) % options.every == 0:
            unbiased = mean / (1 - options.beta**steps)
            state[f"{side}_root"] = root(unbiased, options.power * (3 - len(taken)), options.eps)
    step = between({side: state[f"{side}_root"] for side in taken}, g)
    length = _length(g, state, options)
    return step if length is None else step * (length / step.norm().clamp(min=TINY))


def root(mean: Tensor, power: float, eps: float) -> Tensor:
    """(n, n) positive semidefinite -> its power -`power`, with `eps` times its largest eigenvalue added to each."""
    values, vectors = eigen(mean)
    return vectors * (values + eps * values[-1].clamp(min=TINY)) ** -power @ vectors.T


def _length(g: Tensor, state: dict[str, Any], options: Shampoo) -> Tensor | None:
    """The norm that the step is to have; None: any."""
    if options.graft == "none":
        return None
    if options.graft == "sgd":
        return g.norm()
    squares = state.setdefault("squares", g.new_zeros(g.shape)).lerp_(g.square(), 1 - options.beta)
    return (g / ((squares / (1 - options.beta ** state["steps"])).sqrt() + RMSPROP_EPS)).norm()
