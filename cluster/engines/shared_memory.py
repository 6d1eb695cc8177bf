"""Sums over the workers of one node through memory that they share: a socket on loopback copies each gradient four times."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.futures import Future

WORTH = 2**19  # bytes; below, waiting for each other costs more than the socket
CHUNK = 2**22  # bytes of each worker that `sum_` takes at once: they stay in the processor's cache
ROOM = 2**26  # bytes of each worker that wait for one sum at most
MOST = 8  # workers; beyond, each reading the shares of all costs more than a ring
FOLDER = Path("/dev/shm")
NAME = 64  # bytes of a file's name
LINE = 64  # bytes of a processor's cache line


class SharedMemory:
    """Two slots for each worker, used in turn: whoever writes into one has seen all others done with reading it.

    Shares are added in the order of ranks, so that sums are alike on all workers, and the same however they are cut.
    """

    def __init__(self, rank: int, size: int, memory: Tensor):
        self.rank, self.size, self.slots, self.turn = rank, size, memory.view(2, size, -1), 0
        self.here = torch.zeros(1)

    def sum_(self, t: Tensor) -> Tensor:
        """`t`, contiguous, summed over workers in place; returns it."""
        for part in t.view(-1).split(CHUNK // t.element_size()):
            self._sum([(part, 0)], 1)
        return t

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Averages over workers, in place: divided first, then summed. They wait for each other once, if there is room."""
        for parts in packed(tensors, self.slots.shape[2]):
            self._sum(parts, self.size)

    def _sum(self, parts: Sequence[tuple[Tensor, int]], over: int) -> None:
        for part, at in parts:
            own = self._share(self.rank, part, at)
            own.copy_(part) if over == 1 else torch.div(part, over, out=own)
        dist.all_reduce(self.here.zero_())  # done where all have written
        for part, at in parts:
            torch.add(self._share(0, part, at), self._share(1, part, at), out=part)
            for rank in range(2, self.size):
                part.add_(self._share(rank, part, at))
        self.turn = 1 - self.turn

    def _share(self, rank: int, part: Tensor, at: int) -> Tensor:
        return self.slots[self.turn, rank, at : at + part.nbytes].view(part.dtype)


def packed(tensors: Sequence[Tensor], room: int) -> Iterator[list[tuple[Tensor, int]]]:
    """What fits into a slot of so many bytes: contiguous tensors, or parts of them, each with its place there."""
    parts: list[tuple[Tensor, int]] = []
    used = 0
    for part in (part for t in tensors for part in t.view(-1).split(room // t.element_size())):
        if used + part.nbytes > room:
            yield parts
            parts, used = [], 0
        parts.append((part, used))
        used += -(-part.nbytes // LINE) * LINE
    yield parts


def room(size: int, wanted: int) -> int:
    """Bytes of a slot: whole chunks, `wanted` if possible, and of all slots no more than half of what is free."""
    try:
        free = os.statvfs(FOLDER)
    except OSError:
        return 0
    most = min(ROOM, free.f_bavail * free.f_frsize // (4 * size))
    return min(-(-wanted // CHUNK), most // CHUNK) * CHUNK


def shared_memory(rank: int, size: int, wanted: int) -> SharedMemory | None:
    """Memory of all workers of the default process group, for `wanted` bytes of each at a time, or less where there is less.

    None, on all alike, where they are many or not on one node.
    """
    if not 1 < size <= MOST:
        return None
    length = torch.tensor([2 * size * room(size, wanted)])  # rank 0's counts
    dist.broadcast(length, 0)
    path = reserve(int(length)) if rank == 0 else None
    name = torch.zeros(NAME, dtype=torch.uint8)
    if path:
        name[: len(path.name)] = torch.tensor(list(path.name.encode()), dtype=torch.uint8)
    dist.broadcast(name, 0)
    memory = attach(bytes(name.tolist()).rstrip(b"\0").decode(), int(length))
    missing = torch.tensor([float(memory is None)])
    dist.all_reduce(missing)
    if path:
        path.unlink()  # mapped by all who can: it is freed with the last of them, however that one ends
    return None if memory is None or missing.item() else SharedMemory(rank, size, memory)


def reserve(length: int) -> Path | None:
    """A file of so many bytes in memory; None where there is no such folder, or no room (containers often have 64 MiB)."""
    if not length:
        return None
    try:
        handle, name = tempfile.mkstemp(prefix="bigbatch-", dir=FOLDER)
    except OSError:
        return None
    try:
        os.posix_fallocate(handle, 0, length)
    except OSError:
        os.unlink(name)
        return None
    finally:
        os.close(handle)
    return Path(name)


def attach(name: str, length: int) -> Tensor | None:
    """(length,) uint8, the bytes of that file; None if it is not on this node."""
    path = FOLDER / name
    if not name or not path.is_file():
        return None
    return torch.from_file(str(path), shared=True, size=length, dtype=torch.uint8)


class AverageHook:
    """DDP's average over workers, of all buckets at the end of the backward pass.

    On a CPU nothing is gained by sending some of them earlier; and each time that workers wait for each other, they wait
    for the one that happens to be slower just then.
    """

    def __init__(self, memory: SharedMemory):
        self.memory = memory
        self.waiting: list[tuple[Tensor, Future[Tensor]]] = []

    def __call__(self, bucket: dist.GradBucket) -> Future[Tensor]:
        done: Future[Tensor] = Future()
        self.waiting.append((bucket.buffer(), done))
        if bucket.is_last():
            self.memory.average_([flat for flat, _ in self.waiting])
            for flat, future in self.waiting:
                future.set_result(flat)
            self.waiting = []
        return done
