"""A worker out of reach: the others are told at once or after the gang's time limit, in whatever process group, and it counts
as the network's doing."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from cluster.engines.groups import groups
from cluster.tasks import Done, Failed, attempt
from tests import network
from tests.waiting import until
from tests.workers import LIMIT, run_workers

SHORT = 4.0  # seconds


def lose_two(worker: Any, folder: Path) -> tuple[list[float], list[Done | Failed]]:
    """Rank 0 makes two groups, the others one each. It no longer hears rank 1, and its connections with rank 2 are cut.
    -> its time limits, and what it is told of them."""
    own, struck, done = folder / str(worker.rank), folder / "struck", folder / "done"
    own.mkdir()
    network.tell(own)
    peers = [1, 2] if worker.rank == 0 else [worker.rank]
    limits = [limit(hear(worker, peer)) for peer in peers]
    for pair in ((0, 1), (0, 2)):
        groups.made[pair] = dist.new_group(list(pair), timedelta(seconds=SHORT))  # type: ignore[assignment]
    if worker.rank:
        until(struck.exists)
        attempt(worker.rank, lambda: hear(worker, worker.rank))
        until(done.exists)
        return limits, []
    network.strike("deaf", folder / "1")
    network.strike("cut", folder / "2")
    struck.touch()
    told = [attempt(0, lambda peer=peer: hear(worker, peer)) for peer in peers]  # type: ignore[misc]
    done.touch()
    return limits, told


def hear(worker: Any, peer: int) -> Any:
    """-> the process group through which rank 0 does."""
    worker.broadcast(torch.zeros(1), peer, (0, peer)).wait()
    return groups.made[0, peer]


def limit(group: Any) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_two_workers_out_of_reach(tmp_path: Path) -> None:
    limits, (silent, gone) = run_workers(lose_two, 3, tmp_path)[0]
    assert limits == [LIMIT, LIMIT]  # as long as the group of all; torch by itself gives them half an hour
    assert isinstance(silent, Failed) and silent.lost_peer and "Timed out waiting 4000ms" in silent.message
    assert isinstance(gone, Failed) and gone.lost_peer and "onnection" in gone.message
