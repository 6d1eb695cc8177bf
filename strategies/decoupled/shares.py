"""Examples that each worker keeps its share of, made whole for a checkpoint and shared out again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from strategies.contract import Worker

if TYPE_CHECKING:
    from torch import Tensor

MICRO = "micro"  # to which of its worker's micro-batches an example belongs


def whole(
    micros: Sequence[dict[str, Tensor]],
    size: int,
    worker: Worker,
    everyone: Worker | None = None,
    held: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """(size, ...) for each name, alike on every rank, of each worker's share in micro-batches; and MICRO.

    Where `worker` stands for those of one role, `everyone` is all of them, and of each worker counts what it has `held` alone,
    which is all of it for None; what it has not may be anything of the same shape.
    """
    import torch

    begin, end = _bounds(size, worker)
    lengths = torch.tensor([len(next(iter(micro.values()))) for micro in micros])
    share = {name: torch.cat([micro[name] for micro in micros]) for name in micros[0]}
    share[MICRO] = torch.arange(len(micros)).repeat_interleave(lengths).to(worker.device)
    wholes = {}
    for name, own_part in share.items():
        wholes[name] = own_part.new_zeros(size, *own_part.shape[1:])
        if held is None or name in held:
            wholes[name][begin:end] = own_part
        (everyone or worker).sum_(wholes[name])
    return wholes


def own(wholes: dict[str, Tensor], worker: Worker) -> list[dict[str, Tensor]]:
    """This worker's share of what was `whole`; micro-batches are as they were, if there are as many workers."""
    import torch

    begin, end = _bounds(len(wholes[MICRO]), worker)
    share = {name: t[begin:end].to(worker.device) for name, t in wholes.items()}
    lengths = torch.unique_consecutive(share.pop(MICRO), return_counts=True)[1].tolist()
    pieces = {name: t.split(lengths) for name, t in share.items()}
    return [{name: parts[i] for name, parts in pieces.items()} for i in range(len(lengths))]


def _bounds(size: int, worker: Worker) -> tuple[int, int]:
    """As the trainer shares out a batch."""
    return size * worker.rank // worker.size, size * (worker.rank + 1) // worker.size
