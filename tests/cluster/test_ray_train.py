"""Gangs of Ray Train on real Ray: task after task, and what happens when a worker fails, dies, or is closed at work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("pandas", reason="Ray Train is not installed")

from cluster.gang import connect, disconnect
from cluster.ray_train import TrainGang
from cluster.tasks import Done, Failed, Lost, Outcome, Task
from strategies.contract import Worker
from tests.waiting import at_once

START = 120.0  # seconds for a gang to start on a busy machine


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    connect(2)
    yield
    disconnect()


@pytest.fixture
def gang() -> Iterator[TrainGang]:
    gang = TrainGang(2, timeout=30)
    yield gang
    gang.close()


def run(gang: TrainGang, function: Callable[..., Any], argument: Any = None, limit: float = START) -> Outcome:
    gang.start(Task(function, argument, "ddp", threads=2))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if (outcome := gang.poll(0.5)) is not None:
            return outcome
    pytest.fail(f"no outcome in {limit:g} s")


def processes(worker: Worker, argument: Any) -> list[int]:
    held = torch.zeros(worker.size, dtype=torch.int64)
    held[worker.rank] = os.getpid()
    return worker.sum_(held).tolist()


def threads(worker: Worker, argument: Any) -> int:
    return torch.get_num_threads()


def fail_on_one(worker: Worker, argument: Any) -> None:
    if worker.rank == 1:
        raise ValueError("bad label 11")
    worker.sum_(torch.zeros(1))


def wait_for_peer(worker: Worker, seconds: float) -> None:
    if worker.rank == 1:
        time.sleep(seconds)
    worker.sum_(torch.zeros(1))


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_tasks_follow_each_other_until_one_fails(gang: TrainGang) -> None:
    first, second = run(gang, processes), run(gang, processes)
    assert isinstance(first, Done) and first == second and len(set(first.value)) == 2
    assert run(gang, threads) == Done(2)
    with at_once():
        failed = run(gang, fail_on_one)
    assert isinstance(failed, Failed) and (failed.rank, failed.kind, failed.message) == (
        1,
        "ValueError",
        "bad label 11",
    )
    assert failed.where == f"{Path(__file__).name}:{fail_on_one.__code__.co_firstlineno + 2}"
    gang.close()
    assert not alive(first.value)
    assert not Path(gang.folder).exists()


@pytest.mark.slow
def test_a_killed_worker_is_lost(gang: TrainGang) -> None:
    outcome = run(gang, processes)
    assert isinstance(outcome, Done)
    gang.start(Task(wait_for_peer, 60.0, "ddp"))
    assert gang.poll(0.5) is None
    os.kill(outcome.value[1], signal.SIGKILL)
    end = time.monotonic() + 30
    while (lost := gang.poll(0.5)) is None:
        assert time.monotonic() < end
    assert isinstance(lost, Lost) and lost.rank == 1, lost
    gang.close()
    assert not alive(outcome.value)


@pytest.mark.slow
def test_closed_at_work(gang: TrainGang) -> None:
    """Nobody waits for a task whose result nobody wants."""
    outcome = run(gang, processes)
    assert isinstance(outcome, Done)
    gang.start(Task(wait_for_peer, 60.0, "ddp"))
    assert gang.poll(0.5) is None
    with at_once():
        gang.close()
    assert not alive(outcome.value)


def rest(worker: Worker, seconds: float) -> None:
    time.sleep(seconds)


def stopped(size: int, work: Any) -> Any:
    """What is told when the last of `size` workers is stopped at work."""
    gang = TrainGang(size, timeout=5)
    try:
        outcome = run(gang, processes)
        assert isinstance(outcome, Done)
        gang.start(Task(work, 60.0, "ddp"))
        assert gang.poll(0.5) is None
        os.kill(outcome.value[-1], signal.SIGSTOP)
        lost = gang.poll(20)
    finally:
        gang.close()
    assert not alive(outcome.value)
    return lost


@pytest.mark.slow
def test_a_stopped_worker_is_noticed() -> None:
    """Also where no other one waits for it."""
    assert stopped(1, rest) == Lost(0, "no sign of life from rank 0 for 5 s")


@pytest.mark.slow
def test_a_stopped_worker_is_blamed_not_the_one_that_waits_for_it() -> None:
    lost = stopped(2, wait_for_peer)
    assert isinstance(lost, Lost) and lost.rank == 1, lost


@pytest.mark.slow
def test_it_waits_for_room_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    gang = TrainGang(64, timeout=30)
    try:
        gang.start(Task(rest, 1.0, "ddp"))
        end = time.monotonic() + 30
        while not gang.waits:
            assert gang.poll(0.5) is None and time.monotonic() < end
        began = time.monotonic()
    finally:
        gang.close()
    assert time.monotonic() - began < 3  # nothing of it has started
    assert capsys.readouterr().err.count("gang waits for room for 64 workers x (1 CPUs, 0 GPUs): free on the") == 1
