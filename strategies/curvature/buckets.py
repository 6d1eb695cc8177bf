"""Many tensors as one flat one for one collective; of symmetric matrices only one triangle travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies.contract import Worker


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a tensor, or of a stack of symmetric matrices (..., d, d)."""

    sizes: tuple[int, ...]
    symmetric: bool = False

    @property
    def numel(self) -> int:
        """Numbers that travel."""
        count = 1
        for size in self.sizes:
            count *= size
        return count // self.sizes[-1] * (self.sizes[-1] + 1) // 2 if self.symmetric else count


def to_owners(
    worker: Worker, owners: Mapping[str, int], shapes: Mapping[str, Shape], t: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Sums over workers of what all have by the same names, each on the owner of the name alone: a collective per owner."""
    if worker.size == 1:
        return t
    under_way = []
    for rank, names in _by_rank(owners).items():
        flat = pack([t[name] for name in names], [shapes[name] for name in names])
        under_way.append((rank, names, flat, worker.reduce(flat, rank)))
    for _, _, _, pending in under_way:
        pending.wait()
    mine = [(names, flat) for rank, names, flat, _ in under_way if rank == worker.rank]
    return {name: value for names, flat in mine for name, value in _unpacked(flat, names, shapes).items()}


def from_sources(
    worker: Worker,
    sources: Mapping[str, int],
    among: Sequence[int],
    shapes: Mapping[str, Shape],
    t: Mapping[str, Tensor],
    like: Tensor,
) -> dict[str, Tensor]:
    """What each source has by its names, on all workers `among`, which alone call this: a collective per source.

    `like` has the dtype and device.
    """
    if len(among) == 1:
        return dict(t)
    under_way = []
    for rank, names in _by_rank(sources).items():
        own = [shapes[name] for name in names]
        mine = rank == worker.rank
        flat = pack([t[name] for name in names], own) if mine else like.new_empty(sum(shape.numel for shape in own))
        under_way.append((names, flat, worker.broadcast(flat, rank, among)))
    for _, _, pending in under_way:
        pending.wait()
    return {name: value for names, flat, _ in under_way for name, value in _unpacked(flat, names, shapes).items()}


def _by_rank(ranks: Mapping[str, int]) -> dict[int, list[str]]:
    """Names by rank, in the same order on all workers."""
    return {rank: [name for name, r in ranks.items() if r == rank] for rank in sorted(set(ranks.values()))}


def _unpacked(flat: Tensor, names: Sequence[str], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    return dict(zip(names, unpack(flat, [shapes[name] for name in names]), strict=True))


def pack(tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> Tensor:
    """One flat tensor."""
    return torch.cat([_flat(t, shape) for t, shape in zip(tensors, shapes, strict=True)])


def unpack(flat: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """The inverse of `pack`. What is not symmetric is a view."""
    parts = flat.split([shape.numel for shape in shapes])
    return [_whole(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def _flat(t: Tensor, shape: Shape) -> Tensor:
    return (_half(t) if shape.symmetric else t).reshape(-1)


def _whole(part: Tensor, shape: Shape) -> Tensor:
    if not shape.symmetric:
        return part.view(shape.sizes)
    d = shape.sizes[-1]
    return _mirrored(part.view(*shape.sizes[:-2], -1), d - d // 2, d // 2)


def _half(t: Tensor) -> Tensor:
    """(..., d, d) -> (..., d (d + 1) / 2), without indices as large as the matrix (rectangular full packed, LAPACK note 199).

    Of the blocks [[A, B^T], [B, C]], the lower triangle of A and the upper one of C fill a rectangle.
    """
    d = t.shape[-1]
    low = d // 2
    high = d - low
    corner = t.new_zeros(*t.shape[:-2], high, low + 1)
    corner[..., :high] = t[..., :high, :high].tril()
    corner[..., :low, 1:] += t[..., high:, high:].triu()
    return torch.cat([corner.flatten(-2), t[..., high:, :high].flatten(-2)], -1)


def _mirrored(half: Tensor, high: int, low: int) -> Tensor:
    """The inverse of `_half`, for blocks of sides `high` and `low`."""
    corner, below = half.split([high * (low + 1), low * high], -1)
    corner, below = corner.unflatten(-1, (high, low + 1)), below.unflatten(-1, (low, high))
    first, last = corner[..., :high].tril(), corner[..., :low, 1:].triu()
    first, last = first + first.tril(-1).mT, last + last.triu(1).mT
    return torch.cat([torch.cat([first, below.mT], -1), torch.cat([below, last], -1)], -2)
