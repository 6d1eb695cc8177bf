"""A net of one matrix and one vector, and optimizers stepped on gradients that are written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from strategies.net import Net


class Vectors(Net):
    """`w` (1, n) is a weight matrix; `b` (n,) is a bias, which methods leave unscaled and undecayed."""

    def __init__(self, w: Sequence[float] = (3.0, 4.0), b: Sequence[float] = (1.0, 2.0)):
        super().__init__([])
        self.w = nn.Parameter(torch.tensor([list(w)], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(list(b), dtype=torch.float64))


def steps(
    optimizer: Callable[[Net], Optimizer], gradients: Sequence[Sequence[float]], rates: Sequence[float], net: Vectors
) -> list[list[float]]:
    """`w` after each step, the gradient being the same for `w` and `b`."""
    made, path = optimizer(net), []
    for gradient, rate in zip(gradients, rates, strict=True):
        net.w.grad = torch.tensor([list(gradient)], dtype=torch.float64)
        net.b.grad = torch.tensor(list(gradient), dtype=torch.float64)
        for group in made.param_groups:
            group["lr"] = rate
        made.step()
        path.append(net.w.tolist()[0])
    return path
