"""Weight noise: the gradient of the loss convolved with a Gaussian, E L(w + u), u ~ N(0, sigma^2).

u is drawn anew for each optimizer step, alike in all of its micro-batches and on all workers. Running statistics and counters
move once per batch, to the mean over its passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.backprop import Gradient, Step
from strategies.contract import Clock, Need, Schedule

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

    def __call__(self, step: Step) -> Tensor:
        import torch

        weights = [p for p in step.net.parameters() if p.requires_grad]
        centre = [w.detach().clone() for w in weights]
        part = dataclasses.replace(step, weight=step.weight / (self.draws * (1 + self.antithetic)))
        losses = []
        try:
            for moves in once(step.net.buffers(), self._moves(centre, step.clock)):
                _put(weights, centre, moves)
                losses.append(self.inner(part))
        finally:
            _put(weights, centre)
        return torch.stack(losses).mean()

    def _moves(self, centre: Sequence[Tensor], clock: Clock) -> Iterator[list[Tensor]]:
        """u for each pass, in the shapes of the weights."""
        for draw in range(self.draws):
            u = self._noise(centre, clock, f"weight noise {draw}")
            yield u
            if self.antithetic:
                yield [-part for part in u]

    def _noise(self, centre: Sequence[Tensor], clock: Clock, tag: str) -> list[Tensor]:
        import torch

        sigma, device = self.sigma(clock), centre[0].device
        generator = torch.Generator(device).manual_seed(clock.noise(tag).initial_seed())
        scales = [sigma * w.square().mean().sqrt() if self.relative else sigma for w in centre]
        draws = [torch.randn(w.shape, generator=generator, dtype=w.dtype, device=device) for w in centre]
        return [draw * scale for draw, scale in zip(draws, scales, strict=True)]


def once(buffers: Iterable[Tensor], passes: Iterable[list[Tensor]]) -> Iterator[list[Tensor]]:
    """Each of the passes over one batch, which counts once: each finds the buffers as they were, and their mean is left.

    Integers count passes: of these, the last one's is left.
    """
    buffers = list(buffers)
    before = [b.clone() for b in buffers]
    floats = [b for b in buffers if b.is_floating_point()]
    means = [b.clone() for b in floats]
    for number, one in enumerate(passes, 1):
        _put(buffers, before)
        yield one
        for mean, b in zip(means, floats, strict=True):
            mean.lerp_(b, 1 / number)
    _put(floats, means)


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor], moves: Sequence[Tensor] = ()) -> None:
    """Sets the tensors in place to the values, plus the moves if there are any."""
    import torch

    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
        for tensor, move in zip(tensors, moves, strict=False):
            tensor.add_(move)
