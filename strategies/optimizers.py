"""torch's optimizers, with weight decay on weights alone: biases and norm parameters (1-D) are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from strategies.net import Net


def groups(net: Net, weight_decay: float, adaptive: bool = False) -> list[dict[str, Any]]:
    """Parameter groups: decayed (2 dimensions and more), not decayed (Goyal et al. 2017, section 5.1).

    Each is divided further by the net's `rate_factors`. An `adaptive` optimizer divides gradients by their size, so the rate
    has to follow the net's `gradient_factors`; its decay is times the rate, whose factors it must not feel.
    """
    alike: dict[tuple[bool, float], list[Tensor]] = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            factor = net.rate_factors.get(name, 1.0) * (net.gradient_factors.get(name, 1.0) if adaptive else 1.0)
            alike.setdefault((p.ndim < 2, factor), []).append(p)
    return [
        {"params": parameters, "weight_decay": _decay(weight_decay, plain, adaptive, factor), "rate_factor": factor}
        for (plain, factor), parameters in sorted(alike.items(), key=lambda item: item[0])
    ] or [{"params": []}]


def _decay(weight_decay: float, plain: bool, adaptive: bool, factor: float) -> float:
    return 0.0 if plain else weight_decay / (factor if adaptive else 1.0)


@dataclass(frozen=True, slots=True)
class Sgd:
    """v <- m v + g; w <- w - rate v, or Nesterov's g + m v. The rate is set at each step."""

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def __call__(self, net: Net) -> Optimizer:
        from torch.optim import SGD

        options: dict[str, Any] = {"momentum": self.momentum, "nesterov": self.nesterov, "fused": True}
        return aligned(SGD(groups(net, self.weight_decay), lr=0.0, **options))


@dataclass(frozen=True, slots=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __call__(self, net: Net) -> Optimizer:
        from torch.optim import AdamW

        betas = (self.beta1, self.beta2)
        return aligned(
            AdamW(groups(net, self.weight_decay, adaptive=True), lr=0.0, betas=betas, eps=self.eps, fused=True)
        )


def aligned(optimizer: Optimizer) -> Optimizer:
    """`optimizer`, whose gradients and state are brought into the memory layout of their weights before each step.

    torch's fused optimizers (several times as fast) take this for granted, and are silently wrong where it does not
    hold: after a checkpoint, which keeps no layout, or where a strategy made a gradient of its own.
    """
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: _align(optimizer))
    return optimizer


def _align(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and _layout(p.grad) != _layout(p):
                p.grad = _like(p, p.grad)
            state = optimizer.state.get(p, {})
            for name, value in state.items():
                if getattr(value, "shape", None) == p.shape and _layout(value) != _layout(p):
                    state[name] = _like(p, value)


def _layout(t: Tensor) -> list[int]:
    """Strides of the dimensions that have any extent."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def _like(p: Tensor, value: Tensor) -> Tensor:
    import torch

    return torch.empty_like(p, requires_grad=False).copy_(value)
