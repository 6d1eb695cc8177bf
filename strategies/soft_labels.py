"""Labels as shares of classes, for methods that mix examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def soft(y: Tensor, classes: int, like: Tensor) -> Tensor:
    """(n, classes) labels as shares, in the dtype of `like`, from (n,) class labels or from shares."""
    from torch.nn.functional import one_hot

    return (y if y.ndim == 2 else one_hot(y, classes)).to(like.dtype)
