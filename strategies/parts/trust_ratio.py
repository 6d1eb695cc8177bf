"""torch optimizers that scale each layer's step by the norm of its weights: the machinery of LARS and LAMB.

A layer whose weights or step are zero is not scaled, so that what starts at zero can leave it. No epsilon hides in the
ratios. Groups are those of `strategies.parts.layers`.
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class LarsOptimizer(SGD):
    """SGD on local (g + decay w), with local = trust |w| / (|g| + decay |w|).

    Groups carry `decay` and `trust` (0: local is 1). `rate_inside` puts the rate into the momentum buffer.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, nesterov: bool, rate_inside: bool):
        super().__init__(groups, lr=0.0, momentum=momentum, nesterov=nesterov)
        self.rate_inside = rate_inside

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._scale(group, weights, _grads(weights))
        super().step()

    def _scale(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        decay = group["decay"]
        sizes, slopes = _norms(weights), _norms(grads)
        torch._foreach_add_(grads, weights, alpha=decay)
        if group["trust"]:
            local = group["trust"] * sizes / (slopes + decay * sizes)
            torch._foreach_mul_(grads, _guarded(local, sizes, slopes))
        if self.rate_inside:
            torch._foreach_mul_(grads, group["lr"])
            group["lr"] = 1.0  # until the rate is set for the next step


class LambOptimizer(Optimizer):
    """Adam's direction plus decay w, scaled by |w| / |direction|, at most `clip`, in groups whose `trust` is true."""

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any):
        super().__init__(groups, {"lr": 0.0, "step": 0, **defaults})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                group["step"] += 1
                directions = self._directions(group, weights)
                if group["trust"]:
                    torch._foreach_mul_(directions, _ratios(weights, directions, group["clip"]))
                torch._foreach_add_(weights, directions, alpha=-group["lr"])

    def _directions(self, group: dict[str, Any], weights: list[Tensor]) -> list[Tensor]:
        for p in weights:
            if not self.state[p]:
                self.state[p] = {"mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        means, squares = ([self.state[p][moment] for p in weights] for moment in ("mean", "square"))
        grads = _grads(weights)
        (beta1, beta2), steps = group["betas"], group["step"] if group["bias_correction"] else inf
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2**steps) ** 0.5)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(roots, 1 - beta1**steps)
        directions = list(torch._foreach_div(means, roots))
        torch._foreach_add_(directions, weights, alpha=group["decay"])
        return directions


def _ratios(weights: list[Tensor], directions: list[Tensor], clip: float | None) -> list[Tensor]:
    sizes, lengths = _norms(weights), _norms(directions)
    return _guarded((sizes / lengths).clamp(max=inf if clip is None else clip), sizes, lengths)


def _grads(weights: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in weights if p.grad is not None]


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors))


def _guarded(ratio: Tensor, sizes: Tensor, lengths: Tensor) -> list[Tensor]:
    """One scalar per layer; 1 where either norm is 0."""
    return list(ratio.where((sizes > 0) & (lengths > 0), torch.ones_like(ratio)).unbind())
