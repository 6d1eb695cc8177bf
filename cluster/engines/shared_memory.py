"""Sums over the workers of one node through memory that they share: a socket on loopback copies each gradient four times."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.futures import Future

WORTH = 2**19  # bytes; below, waiting for each other costs more than the socket
CHUNK = 2**22  # bytes of each worker that are in shared memory at once: they stay in the processor's cache
MOST = 8  # workers; beyond, each reading the shares of all costs more than a ring
FOLDER = Path("/dev/shm")
NAME = 64  # bytes of a file's name


class SharedMemory:
    """Two slots for each worker, used in turn: whoever writes into one has seen all others done with reading it.

    Shares are added in the order of ranks, so that sums are alike on all workers, and the same however they are cut.
    """

    def __init__(self, rank: int, size: int, memory: Tensor):
        self.rank, self.slots, self.turn = rank, memory.view(2, size, CHUNK), 0
        self.here = torch.zeros(1)

    def sum_(self, t: Tensor) -> Tensor:
        """`t`, contiguous, summed over workers in place; returns it."""
        for part in t.view(-1).split(CHUNK // t.element_size()):
            shares = self.slots[self.turn].view(t.dtype)[:, : len(part)]
            self.turn = 1 - self.turn
            shares[self.rank].copy_(part)
            dist.all_reduce(self.here.zero_())  # done where all have written
            torch.add(shares[0], shares[1], out=part)
            for share in shares[2:]:
                part.add_(share)
        return t


def shared_memory(rank: int, size: int) -> SharedMemory | None:
    """Memory of all workers of the default process group. None, on all alike, where they are many or not on one node."""
    if not 1 < size <= MOST:
        return None
    length = 2 * size * CHUNK
    path = reserve(length) if rank == 0 else None
    name = torch.zeros(NAME, dtype=torch.uint8)
    if path:
        name[: len(path.name)] = torch.tensor(list(path.name.encode()), dtype=torch.uint8)
    dist.broadcast(name, 0)
    memory = attach(bytes(name.tolist()).rstrip(b"\0").decode(), length)
    missing = torch.tensor([float(memory is None)])
    dist.all_reduce(missing)
    if path:
        path.unlink()  # mapped by all who can: it is freed with the last of them, however that one ends
    return None if memory is None or missing.item() else SharedMemory(rank, size, memory)


def reserve(length: int) -> Path | None:
    """A file of so many bytes in memory; None where there is no such folder, or no room (containers often have 64 MiB)."""
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


def average_hook(worker: tuple[SharedMemory, int], bucket: dist.GradBucket) -> Future[Tensor]:
    """DDP's average over workers: large buckets through shared memory, small ones as usual. Scaled first, then summed."""
    memory, size = worker
    flat = bucket.buffer().div_(size)
    if flat.nbytes < WORTH:
        return dist.all_reduce(flat, async_op=True).get_future().then(lambda done: done.value()[0])
    done: Future[Tensor] = Future()
    done.set_result(memory.sum_(flat))
    return done
