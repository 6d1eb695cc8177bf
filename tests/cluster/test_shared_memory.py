"""Sums through shared memory: the same numbers as by sockets, nothing left behind, and sockets where it cannot be."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engines import shared_memory as module
from cluster.engines.shared_memory import CHUNK, WORTH
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


@pytest.mark.parametrize("open_model", [False, True])
def test_training_is_the_same_bit_for_bit(open_model: bool) -> None:
    shared, sockets = (run_workers(trained, 2, open_model, share_memory=on) for on in (True, False))
    assert [used for used, _ in shared + sockets] == [True, True, False, False]
    for (_, ours), (_, theirs) in zip(shared, sockets, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


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
