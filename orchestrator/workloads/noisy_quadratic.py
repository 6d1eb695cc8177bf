"""Expected SGD on a noisy quadratic, in closed form: a workload that costs nothing and whose answer is known.

Coordinate i = 1 .. d has curvature and gradient noise h = c = 1/i and starts at 1. Its second moment m = E[x^2] follows
m <- (1 - rate h)^2 m + rate^2 c / batch, and the loss is 0.5 sum(h m). Model of Zhang et al. 2019, arXiv 1907.04164.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from strategies.contract import Batch, Clock, Metrics, Need, Schedule, State, Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class NoisyQuadratic:
    """Learner: second moments of coordinates, in float64, instead of weights. Examples are counted, not looked at."""

    dimension: int
    rate: Schedule

    @property
    def needs(self) -> Need:
        return Need.NOTHING

    def init(self, net: Net, worker: Worker) -> State:
        import torch

        ones = torch.ones(self.dimension, dtype=torch.float64, device=worker.device)
        curvature = ones / torch.arange(1, self.dimension + 1, device=worker.device)
        return State({"second_moment": ones.clone()}, live=(worker.size, curvature, ones))

    def step(self, state: State, batches: Sequence[Batch], clock: Clock) -> Metrics:
        """The loss told is the one after this step, so that row `step` of the metrics is the closed form at `step`."""
        rate, moment, (workers, curvature, ones) = self.rate(clock), state.saved["second_moment"], state.live
        contraction = ones.add(curvature, alpha=-rate)
        moment.mul_(contraction).mul_(contraction).add_(curvature, alpha=rate**2 / clock.batch)
        return {"loss": curvature.dot(moment) * (0.5 / workers)}

    def predict(self, state: State, x: Tensor) -> Tensor:
        """(n, ...) -> (n, 1): the loss, which `QuadraticData.score` takes as it is."""
        _, curvature, _ = state.live
        return (0.5 * curvature.dot(state.saved["second_moment"])).expand(len(x), 1)

    def finish(self, state: State) -> None:
        pass


class QuadraticData:
    """The interface of `Dataset` for a workload that has no examples."""

    examples = 10_000  # so that an epoch has a length
    test_examples = 1
    inputs = (1,)
    classes = 1

    def __init__(self, device: torch.device, dtype: torch.dtype):
        import torch

        self.device = device
        self.x = torch.zeros(1, 1, device=device, dtype=dtype)
        self.y = torch.zeros(1, device=device, dtype=torch.int64)

    def train(self, start: int, stop: int) -> Batch:
        import torch

        n = stop - start
        return Batch(self.x.expand(n, 1), self.y.expand(n), torch.arange(start, stop, device=self.device))

    def first(self, n: int) -> Batch:
        return self.train(0, n)

    def test(self, start: int, stop: int) -> Batch:
        return self.train(start, stop)

    def score(self, logits: Tensor, y: Tensor) -> Metrics:
        return {"test_loss": logits.sum()}


def network(inputs: tuple[int, ...], classes: int) -> Net:
    """No parameters: the learner keeps the moments itself."""
    from strategies.net import Net

    return Net([])


def loss_after(steps: int, rate: float, batch: int, dimension: int) -> float:
    """The loss after `steps` steps at a constant rate: what is left of the start, and the fixed point."""
    return _Closed(rate, batch, dimension).loss(steps)


def steps_to_target(rate: float, batch: int, target: float, dimension: int) -> int | None:
    """The first step at which the loss is at most `target`, at a constant rate in (0, 2); None if it never is.

    Exact where the loss crosses the target once, which holds for every rate up to 1.
    """
    closed = _Closed(rate, batch, dimension)
    if closed.loss(0) <= target:
        return 0
    if closed.floor > target:
        return None
    above, below = 0, 1
    while closed.loss(below) > target:
        above, below = below, 2 * below
    while below - above > 1:
        middle = (above + below) // 2
        above, below = (middle, below) if closed.loss(middle) > target else (above, middle)
    return below


class _Closed:
    def __init__(self, rate: float, batch: int, dimension: int):
        self.h: NDArray[np.float64] = 1 / np.arange(1, dimension + 1)
        self.squeeze = np.square(1 - rate * self.h)
        self.fixed = rate / (batch * (2 - rate * self.h))
        self.floor = 0.5 * float(self.h @ self.fixed)

    def loss(self, steps: int) -> float:
        left = self.squeeze**steps
        return 0.5 * float(self.h @ (left + (1 - left) * self.fixed))
