"""Small networks in modules, and their learner by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cluster.engines import make_worker
from strategies.backprop import CrossEntropy
from strategies.contract import Batch, Clock, ModelSpec, State
from strategies.decoupled.boundary import build
from strategies.decoupled.synthetic import Guess, Share, Synthetic
from strategies.net import Net
from strategies.optimizers import Sgd
from strategies.rate import Rate
from tests.strategies.harness import CLASSES

WIDTH, IMAGES = (6,), (2, 6, 6)


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def mlp(inputs: tuple[int, ...], classes: int, depth: int = 3) -> Net:
    stages = [nn.Sequential(nn.Linear(8 if i else inputs[0], 8), nn.Tanh()) for i in range(depth)]
    return Net(stages, head=nn.Linear(8, classes))


def cnn(inputs: tuple[int, ...], classes: int) -> Net:
    first = nn.Sequential(nn.Conv2d(inputs[0], 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net([first, Residual(4), Residual(4)], pool, nn.Linear(4, classes))


class Rig:
    """A learner on one network and one batch, with gradients to look at."""

    def __init__(self, model: Any, inputs: tuple[int, ...], cuts: tuple[int, ...] | None = None, **options: Any):
        torch.manual_seed(0)
        self.net = build(inputs, CLASSES, ModelSpec(model), cuts).double()
        settings: dict[str, Any] = {
            "guess": Guess(),
            "share": Share(0.0, 0.0, 0.0),
            "queue": 0,
            "guess_inputs": False,
        } | options
        self.learner = Synthetic(optimizer=Sgd(momentum=0.0), rate=Rate(0.1), **settings)
        self.state: State = self.learner.init(self.net, make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")))
        self.batch = random_batch(inputs)

    def gradients(self) -> list[dict[str, Tensor]]:
        """Of each module after one micro-batch that is the whole batch."""
        self.learner.exchange(self.state, self.batch, self.clock(), 1.0)
        return [{name: p.grad.clone() for name, p in part.named_parameters()} for part in self.state.live.parts]

    def clock(self, step: int = 0) -> Clock:
        return Clock(step, 10, 0.1 * step, 0.1, len(self.batch), 0)

    def step(self, step: int = 0, batch: Batch | None = None) -> dict[str, Tensor]:
        return self.learner.step(self.state, [batch or self.batch], self.clock(step))

    def backprop(self) -> list[dict[str, Tensor]]:
        self.net.zero_grad()
        CrossEntropy()(self.net, self.batch, self.clock()).backward()
        return [{name: p.grad.clone() for name, p in part.named_parameters()} for part in self.net.parts()]  # type: ignore[union-attr]


def random_batch(inputs: tuple[int, ...], n: int = 8, seed: int = 1) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *inputs, generator=made, dtype=torch.float64)
    return Batch(x, torch.arange(n) % CLASSES, torch.arange(n))


def perturbed(rig: Rig) -> Rig:
    """With synthesisers that say something."""
    made = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in (p for helper in rig.state.live.helpers for p in helper.parameters()):
            p.add_(torch.randn(p.shape, generator=made, dtype=p.dtype), alpha=0.1)
    return rig
