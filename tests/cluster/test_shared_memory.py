"""Sums through shared memory: the same numbers as by sockets, nothing left behind, and sockets where it cannot be."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.engines import shared_memory as module
from cluster.engines.shared_memory import CHUNK, LINE, WORTH, packed, room
from tests.workers import run_workers

LENGTH = 2 * CHUNK // 8 + 12345  # float64: more than two chunks, the last one not full


def share(rank: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def big_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Tanh(), torch.nn.Linear(300, 4)).double()


def sums(worker: Any) -> tuple[bool, torch.Tensor, list[str]]:
    net = big_net()
    worker.prepare(net, torch.optim.SGD(net.parameters()), open_model=True)
    first = [worker.sum_(share(worker.rank)) for _ in range(5)][-1]
    left = [name for name in os.listdir(module.FOLDER) if name.startswith("bigbatch-")]
    return worker.shared is not None, first, left


@pytest.mark.parametrize("size", [2, 3])
def test_sums_in_the_order_of_ranks(size: int) -> None:
    expected = share(0)
    for rank in range(1, size):
        expected += share(rank)
    for shared, total, left in run_workers(sums, size):
        assert shared and torch.equal(total, expected) and not left


def trained(worker: Any, open_model: bool) -> tuple[bool, list[torch.Tensor]]:
    net = big_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    model = worker.prepare(net, optimizer, open_model=open_model)
    for step in range(4):
        x = share(10 * step + worker.rank, 8 * 300).view(8, 300)
        with worker.micro(model, last=True):
            worker.backward(model(x).square().mean())
        worker.apply(model, optimizer, lambda: None, lambda: None)
    return worker.shared is not None, [p.detach() for p in net.parameters()]


def trained_with_little_room(worker: Any, open_model: bool) -> tuple[bool, list[torch.Tensor]]:
    """Several buckets, the largest of which does not fit at once."""
    module.ROOM = module.CHUNK = 2**14
    return trained(worker, open_model)


@pytest.mark.parametrize("train", [trained, trained_with_little_room])
@pytest.mark.parametrize("open_model", [False, True])
def test_training_is_the_same_bit_for_bit(open_model: bool, train: Callable[..., Any]) -> None:
    options = {"bucket_mib": 0.01}  # 10 KiB: all small parameters before the large matrix
    shared, sockets = (run_workers(train, 2, open_model, share_memory=on, **options) for on in (True, False))
    assert [used for used, _ in shared + sockets] == [True, True, False, False]
    for (_, ours), (_, theirs) in zip(shared, sockets, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@given(st.lists(st.integers(1, 400), min_size=1), st.integers(1, 20))
def test_what_is_packed(lengths: list[int], lines: int) -> None:
    """All of it, in order, each on lines of its own, no slot overfull; a new slot only where the next part did not fit."""
    tensors, size = [torch.randn(n, dtype=torch.float64) for n in lengths], lines * LINE
    slots = list(packed(tensors, size))
    assert torch.equal(torch.cat([part for parts in slots for part, _ in parts]), torch.cat(tensors))
    for parts in slots:
        ends = [0] + [at + part.nbytes for part, at in parts]
        assert all(at % LINE == 0 and end <= at < end + LINE for (_, at), end in zip(parts, ends, strict=False))
        assert ends[-1] <= size
    for parts, (first, *_) in pairwise(slots):
        assert -(-(parts[-1][1] + parts[-1][0].nbytes) // LINE) * LINE + first[0].nbytes > size


def rooms(worker: Any) -> list[int]:
    found = []
    for width in (300, 1500, 300):
        net = torch.nn.Linear(width, width, dtype=torch.float64)
        worker.prepare(net, torch.optim.SGD(net.parameters()), open_model=False)
        found.append(worker.shared.slots.shape[2])
    return found


def test_room_grows_with_the_network() -> None:
    assert run_workers(rooms, 2) == [[CHUNK, 5 * CHUNK, 5 * CHUNK]] * 2


def test_no_more_than_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = SimpleNamespace(f_bavail=2**14, f_frsize=2**12)  # 64 MiB, as containers have
    monkeypatch.setattr(os, "statvfs", lambda _: blocks)
    assert [room(size, 2**24) for size in (2, 4, 8)] == [2 * CHUNK, CHUNK, 0]
    assert room(2, 1) == CHUNK


def without_room(worker: Any) -> tuple[bool, torch.Tensor, list[str]]:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    os.posix_fallocate = full
    return sums(worker)


def on_another_node(worker: Any, folder: str) -> tuple[bool, torch.Tensor, list[str]]:
    if worker.rank == 1:
        module.FOLDER = Path(folder)
    return sums(worker)


def test_sockets_where_memory_cannot_be_shared(tmp_path: Path) -> None:
    for results in (run_workers(without_room, 2), run_workers(on_another_node, 2, str(tmp_path))):
        for shared, total, left in results:
            assert not shared and torch.allclose(total, share(0) + share(1), atol=0, rtol=1e-14) and not left


def test_small_networks_are_left_to_sockets() -> None:
    assert sum(p.nbytes for p in big_net().parameters()) >= WORTH  # else the tests above test nothing
    assert not any(run_workers(small, 2))


def small(worker: Any) -> bool:
    net = torch.nn.Linear(3, 4)
    worker.prepare(net, torch.optim.SGD(net.parameters()), open_model=True)
    return worker.shared is not None
