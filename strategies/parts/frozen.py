"""What frozen stages make of examples: the same bits whatever batch an example stands in, so that it can be kept on file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

CHUNKS = {"cpu": 16, "cuda": 256}  # examples that frozen stages see at once, by device


def through(stages: Iterable[nn.Module], x: Tensor) -> Tensor:
    """(n, ...) -> (n, ...), in the dtype of `x` and without a gradient.

    Examples go in chunks of a fixed size, the last one filled up: the last bits of a product depend on its shape.
    """
    stages = list(stages)
    if not stages or not len(x):
        return _run(stages, x)
    size = chunk(x.device)
    return torch.cat([_run(stages, _filled(part, size))[: len(part)] for part in x.split(size)])


def chunk(device: torch.device) -> int:
    return CHUNKS.get(device.type, CHUNKS["cpu"])


@torch.no_grad()
def _run(stages: Sequence[nn.Module], x: Tensor) -> Tensor:
    dtype = x.dtype
    for stage in stages:
        x = stage(x)
    return x.to(dtype)


def _filled(x: Tensor, size: int) -> Tensor:
    """`x` with zeros behind it, in the same memory layout."""
    if len(x) == size:
        return x
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    out = torch.empty((size, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout).zero_()
    out[: len(x)] = x
    return out


def channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
