"""What changes of the training batch share: their order in a phase, and labels as shares of classes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from strategies.contract import BatchMap, Phase

if TYPE_CHECKING:
    from torch import Tensor


def with_map(phase: Phase, change: BatchMap) -> Phase:
    """The phase with a change of its batches, after those that are there and have the same `turn`.

    0: mixes what the stream holds; 1, where it says nothing: the rest, in the order of the recipe; 2: hides parts of inputs.
    """
    maps = sorted((*phase.maps, change), key=lambda change: getattr(change, "turn", 1))
    return dataclasses.replace(phase, maps=tuple(maps))


def soft(y: Tensor, classes: int, like: Tensor) -> Tensor:
    """(n, classes) labels as shares, in the dtype of `like`, from (n,) class labels or from shares."""
    from torch.nn.functional import one_hot

    return (y if y.ndim == 2 else one_hot(y, classes)).to(like.dtype)
