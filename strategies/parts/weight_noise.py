"""Weight noise: the gradient of the loss convolved with a Gaussian, E L(w + u), u ~ N(0, sigma^2).

u is drawn anew for each optimizer step, alike in all of its micro-batches and on all workers. Running statistics and counters
move once per batch, to the mean over its passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.backprop import Backprop, Gradient, Step, Update
from strategies.contract import Clock, Need, PlanError, Schedule
from strategies.parts.displaced import displaced, restore

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightNoise:
    """The mean of the gradient `inner` over `draws` of u or, `antithetic`, over u and -u of each."""

    inner: Gradient
    sigma: Schedule
    draws: int
    antithetic: bool
    relative: bool  # sigma counts in root mean squares of each parameter

    @property
    def needs(self) -> Need:
        return Need.OPEN_MODEL | getattr(self.inner, "needs", Need.NOTHING)

    @property
    def passes(self) -> int:
        return self.draws * (1 + self.antithetic)

    def __call__(self, step: Step) -> Tensor:
        import torch

        weights = [p for p in step.net.parameters() if p.requires_grad]
        part = dataclasses.replace(step, weight=step.weight / self.passes)
        losses = []
        for move in once(step.net.buffers(), self._moves(weights, step.clock)):
            with displaced(weights, move):
                losses.append(self.inner(part))
        return torch.stack(losses).mean()

    def _moves(self, weights: Sequence[Tensor], clock: Clock) -> Iterator[list[Tensor]]:
        """u for each pass, in the shapes of the weights."""
        for draw in range(self.draws):
            u = self._noise(weights, clock, f"weight noise {draw}")
            yield u
            if self.antithetic:
                yield [-part for part in u]

    def _noise(self, weights: Sequence[Tensor], clock: Clock, tag: str) -> list[Tensor]:
        import torch

        sigma, device = self.sigma(clock), weights[0].device
        generator = torch.Generator(device).manual_seed(clock.noise(tag).initial_seed())
        scales = [sigma * w.detach().square().mean().sqrt() if self.relative else sigma for w in weights]
        draws = [torch.randn(w.shape, generator=generator, dtype=w.dtype, device=device) for w in weights]
        return [draw * scale for draw, scale in zip(draws, scales, strict=True)]


@dataclass(frozen=True, slots=True)
class SeveralPasses(Update):
    """Changes nothing: refuses what would take each pass for a part of the batch, unless it says `passes = True`."""

    def suits(self, learner: Backprop) -> None:
        for update in learner.updates:
            if update.turn == 0 and not getattr(update, "passes", False):
                raise PlanError(
                    f"loss_smoothing takes several passes for one gradient, but {update} measures each: "
                    "set draws: 1 and antithetic: false, or leave one of the two out"
                )


def once(buffers: Iterable[Tensor], passes: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Each of the passes over one batch, which counts once: each finds the buffers as they were, and their mean is left.

    Integers count passes: of these, the last one's is left.
    """
    buffers = list(buffers)
    before = [b.clone() for b in buffers]
    floats = [b for b in buffers if b.is_floating_point()]
    means = [b.clone() for b in floats]
    for number, one in enumerate(passes, 1):
        restore(buffers, before)
        yield one
        for mean, b in zip(means, floats, strict=True):
            mean.lerp_(b, 1 / number)
    restore(floats, means)
