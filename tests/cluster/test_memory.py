"""What ranks do with the memory that they free: a step asks for the same large tensors again."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Iterator

import pytest
import torch

from cluster import session
from cluster.gang import RayGang, connect, disconnect
from orchestrator.allocator import keep_freed_memory
from strategies.contract import Worker
from tests.cluster.test_gang import run, value

PAGES = 256  # of a mebibyte


@pytest.fixture(scope="module")
def gang() -> Iterator[RayGang]:
    connect(1)
    gang = RayGang(1, timeout=30)
    yield gang
    gang.close()
    disconnect()


def mapped(worker: Worker, mebibytes: int) -> float:
    """The share of its pages that are mapped anew when a tensor of this size is made, once the heap has its size.

    The median of several: where a thread of Ray's takes a few bytes of what was freed, the heap grows by one tensor, once.
    """
    assert keep_freed_memory()
    return statistics.median([faults(mebibytes) for _ in range(15)][10:]) / (mebibytes * PAGES)


def faults(mebibytes: int) -> int:
    """Pages that are mapped while a tensor of this size is made."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mebibytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.parametrize("mebibytes", [16, 48, 128])
def test_a_rank_keeps_what_it_frees(gang: RayGang, mebibytes: int) -> None:
    """Also what is larger than the 64 MiB of a heap of glibc's further threads, in one of which a rank trains."""
    assert value(run(gang, mapped, mebibytes)) < 0.02


def test_ranks_of_other_clusters_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that we start has inherited the setting; to others it goes with each rank."""
    monkeypatch.setenv(session.ARENAS, "1")
    assert session.of_ranks() == {}
    monkeypatch.delenv(session.ARENAS)
    assert session.of_ranks() == {"env_vars": {"MALLOC_ARENA_MAX": "1"}}
