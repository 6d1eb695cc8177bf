"""What workers hold of their own: averaged in place, or gathered, by one collective for each dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from strategies.contract import Worker

if TYPE_CHECKING:
    from torch import Tensor


def average_(tensors: Sequence[Tensor], worker: Worker) -> None:
    """Each becomes its mean over workers, alike on every rank."""
    for alike in _by_dtype(tensors):
        _fill_(alike, worker.sum_(_flat(alike)) / worker.size)


def copy_(tensors: Sequence[Tensor], worker: Worker, rank: int) -> None:
    """Each becomes what the worker `rank` has, alike on every rank."""
    import torch

    for alike in _by_dtype(tensors):
        flat = _flat(alike)
        _fill_(alike, worker.sum_(flat if worker.rank == rank else torch.zeros_like(flat)))


def gathered(tensors: Sequence[Tensor], worker: Worker) -> list[Tensor]:
    """(workers, n) for each dtype, row r being all of rank r's tensors of it, flat; alike on every rank."""
    rows = [_flat(alike) for alike in _by_dtype(tensors)]
    tables = [row.new_zeros(worker.size, len(row)) for row in rows]
    for table, row in zip(tables, rows, strict=True):
        table[worker.rank] = row
    return [worker.sum_(table) for table in tables]


def scatter_(tables: Sequence[Tensor], tensors: Sequence[Tensor], rank: int) -> None:
    """Into `tensors` what the worker `rank` had `gathered`."""
    for table, alike in zip(tables, _by_dtype(tensors), strict=True):
        _fill_(alike, table[rank])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _fill_(tensors: Sequence[Tensor], flat: Tensor) -> None:
    for t, own in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.detach().copy_(own.view_as(t))


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[t for t in tensors if t.dtype == dtype] for dtype in sorted({t.dtype for t in tensors}, key=str)]


def tensors_in(data: Any) -> Iterator[Tensor]:
    """The tensors of nested maps and lists, such as an optimizer's state_dict, in order."""
    import torch

    if isinstance(data, torch.Tensor):
        yield data
    elif isinstance(data, dict | list):
        for value in data.values() if isinstance(data, dict) else data:
            yield from tensors_in(value)
