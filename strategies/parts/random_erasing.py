"""Random erasing: a rectangle of an image becomes 0, the mean of normalised data (Zhong et al. 2020, arXiv 1708.04896)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from strategies.contract import Batch, Clock, PlanError, Schedule, Stream

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 0.02  # share of the image
DRAWS = 6  # per image: whether, area, aspect, upright or not, top, left


@dataclass(frozen=True, slots=True)
class Erase:
    turn: ClassVar[int] = 2
    share: Schedule  # of the images
    area: float  # share of an image that is erased at most
    aspect: float  # shorter over longer side at least

    def __call__(self, batch: Batch, clock: Clock, stream: Stream) -> Batch:
        x = batch.x
        if x.ndim != 4:
            raise PlanError(
                f"loss_smoothing erases parts of images, the data have shape {tuple(x.shape[1:])}: set erase: 0"
            )
        draws = uniform(dataclasses.replace(clock, rank=0)).to(x.device)[batch.position % clock.batch]
        hit, (height, width) = draws[:, 0] < self.share(clock), x.shape[2:]
        holes = rectangles(draws, height, width, self.area, self.aspect) & hit[:, None, None]
        return dataclasses.replace(batch, x=x.masked_fill(holes[:, None], 0))


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
