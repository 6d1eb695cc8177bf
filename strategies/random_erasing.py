"""Random erasing: a rectangle of an image becomes 0, the mean of normalised data (Zhong et al. 2020, arXiv 1708.04896).

Erased is what the network sees in the end, after all maps of the batch, so this stands at the gradient.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from strategies.backprop import Gradient, Step
from strategies.contract import Batch, Clock, Need, PlanError, Schedule

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 0.02  # share of the image
DRAWS = 6  # per image: whether, area, aspect, upright or not, top, left


@dataclass(frozen=True, slots=True)
class Erase:
    """The gradient `inner` of images of which rectangles are 0, each with the probability `share` of the step."""

    inner: Gradient
    share: Schedule
    area: float  # share of the image that is erased at most
    aspect: float  # shorter over longer side at least

    @property
    def needs(self) -> Need:
        return getattr(self.inner, "needs", Need.NOTHING)

    def __call__(self, step: Step) -> Tensor:
        x = step.batch.x.masked_fill(self._holes(step.batch, step.clock)[:, None], 0)
        return self.inner(dataclasses.replace(step, batch=dataclasses.replace(step.batch, x=x)))

    def _holes(self, batch: Batch, clock: Clock) -> Tensor:
        """(n, h, w) True where an image is erased. Raises PlanError for other data."""
        x = batch.x
        if x.ndim != 4:
            raise PlanError(
                f"loss_smoothing erases parts of images, the data have shape {tuple(x.shape[1:])}: set erase: 0"
            )
        draws = uniform(dataclasses.replace(clock, rank=0)).to(x.device)[batch.position % clock.batch]
        hit = draws[:, 0] < self.share(clock)
        return rectangles(draws, *x.shape[2:], self.area, self.aspect) & hit[:, None, None]


@lru_cache(maxsize=2)  # of the step's other micro-batches
def uniform(clock: Clock) -> Tensor:
    """(global batch, DRAWS) float64 numbers in [0, 1), alike on all ranks."""
    import torch

    return torch.rand(clock.batch, DRAWS, generator=clock.noise("random erasing"), dtype=torch.float64)


def rectangles(draws: Tensor, height: int, width: int, area: float, aspect: float) -> Tensor:
    """(n, height, width) True inside one rectangle per image, of whole pixels, wherever it fits.

    Its area is uniform in [SMALLEST, area] of the image, its shorter side over its longer one in [aspect, 1], either upright.
    """
    import torch

    _, size, ratio, upright, top, left = draws.T
    pixels = (SMALLEST + (area - SMALLEST) * size) * height * width
    ratio = aspect + (1 - aspect) * ratio
    ratio = torch.where(upright < 0.5, ratio, 1 / ratio)
    rows = _spans((pixels * ratio).sqrt(), top, height)
    columns = _spans((pixels / ratio).sqrt(), left, width)
    return rows[:, :, None] & columns[:, None, :]


def _spans(length: Tensor, start: Tensor, size: int) -> Tensor:
    """(n, size) True along whole pixels, 1 at least; `start` in [0, 1): where, among the places that there are."""
    import torch

    length = length.round().clamp(1, size)
    first = (start * (size - length + 1)).floor()
    place = torch.arange(size, device=length.device)
    return (place >= first[:, None]) & (place < (first + length)[:, None])
