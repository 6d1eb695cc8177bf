"""Gangs on real Ray: speed, side by side, and what happens when ranks fail, die, stop, or lose their driver."""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.nn.functional import cross_entropy

from cluster.actor import Rank
from cluster.gang import RayGang, capacity, connect, disconnect, ray
from cluster.local import LocalGang
from cluster.reaper import family
from cluster.tasks import CapacityError, Done, Failed, Lost, Outcome, Task
from strategies.contract import Worker
from tests.waiting import AT_ONCE, at_once

ROOT = Path(__file__).parents[2]
CPUS = 6  # room for the warm gang and two more
START = 60.0  # seconds for a gang to start on a busy machine


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    connect(CPUS)
    yield
    disconnect()


@pytest.fixture
def gangs() -> Iterator[Callable[..., RayGang]]:
    """Makes gangs of two, and closes them."""
    made: list[RayGang] = []

    def make(**options: Any) -> RayGang:
        made.append(RayGang(2, **({"timeout": 30} | options)))
        return made[-1]

    yield make
    for gang in made:
        gang.close()


@pytest.fixture(scope="module")
def warm(cluster: None) -> Iterator[RayGang]:
    """A gang for tests that leave it whole."""
    gang = RayGang(2, timeout=30, name="warm")
    yield gang
    gang.close()


def run(gang: Any, function: Callable[..., Any], argument: Any = None, limit: float = START) -> Outcome:
    gang.start(Task(function, argument, "ddp"))
    outcome = gang.poll(limit)
    assert outcome is not None, f"no outcome in {limit:g} s"
    return outcome


def value(outcome: Outcome) -> Any:
    assert isinstance(outcome, Done), outcome
    return outcome.value


def add_up(worker: Worker, argument: float) -> float:
    return worker.sum_(torch.tensor(argument * (worker.rank + 1))).item()


def processes(worker: Worker, argument: Any) -> list[int]:
    held = torch.zeros(worker.size, dtype=torch.int64)
    held[worker.rank] = os.getpid()
    return worker.sum_(held).tolist()


def train(worker: Worker, seed: int) -> list[float]:
    """A few steps of SGD; -> all losses and weights, bit by bit."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model = worker.prepare(net, optimizer, False)  # type: ignore[arg-type]
    x, y = torch.randn(128, 64).chunk(2)[worker.rank], torch.randint(10, (128,)).chunk(2)[worker.rank]
    losses = []
    for _ in range(10):
        with worker.micro(model, True), worker.autocast():
            loss = cross_entropy(model(x), y)
            worker.backward(loss)
        worker.apply(model, optimizer, lambda: None, lambda: None)
        losses.append(worker.sum_(loss.detach().clone()).item())
    return losses + torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()


def spoil(worker: Worker, argument: Any) -> None:
    """Leaves behind what a careless task may."""
    torch.manual_seed(99)
    torch.set_default_dtype(torch.float64)


def test_twenty_tasks_follow_each_other_within_milliseconds(warm: RayGang) -> None:
    assert value(run(warm, add_up, 1.0)) == 3.0
    gaps = []
    for i in range(20):
        began = time.perf_counter()
        assert value(run(warm, add_up, float(i))) == 3.0 * i
        gaps.append(time.perf_counter() - began)
    print(
        f"gang ready in {warm.startup_seconds:.2f} s; median gap between tasks {statistics.median(gaps) * 1e3:.1f} ms"
    )
    assert statistics.median(gaps) < 0.5


def test_cold_and_as_fifth_task_are_bit_identical(warm: RayGang, gangs: Callable[..., RayGang]) -> None:
    cold = value(run(gangs(), train, 7))
    for task in (train, add_up, spoil, train):
        value(run(warm, task, 3))
    assert value(run(warm, train, 7)) == cold


def test_two_gangs_run_side_by_side(gangs: Callable[..., RayGang]) -> None:
    pair = [gangs(name="a"), gangs(name="b")]
    ids = [set(value(run(gang, processes))) for gang in pair]
    assert len(ids[0] | ids[1]) == 4
    for gang in pair:
        gang.start(Task(rest, 2.0, "ddp"))
    (began, ended), (began_too, ended_too) = (value(gang.poll(START)) for gang in pair)
    assert max(began, began_too) < min(ended, ended_too)


def niceness(worker: Worker, argument: Any) -> int:
    return os.nice(0)


def test_ranks_are_as_urgent_as_their_driver(warm: RayGang) -> None:
    assert value(run(warm, niceness)) == os.nice(0)


def rest(worker: Worker, seconds: float) -> tuple[float, float]:
    """-> when it began and when it ended."""
    began = time.monotonic()
    time.sleep(seconds)
    return began, time.monotonic()


def test_a_busy_gang_refuses_a_second_task(warm: RayGang) -> None:
    warm.start(Task(rest, 0.2, "ddp"))
    assert warm.poll(0.01) is None
    with pytest.raises(RuntimeError, match="warm cannot take a task: it is busy"):
        warm.start(Task(rest, 0.2, "ddp"))
    assert isinstance(warm.poll(START), Done)


# ------------------------------------------------------------------------------------------------------------ faults


def fail_on_one(worker: Worker, argument: Any) -> None:
    if worker.rank == 1:
        raise ValueError("bad label 11")
    worker.sum_(torch.zeros(1))


def fail_both(worker: Worker, argument: Any) -> None:
    """Rank 1 raises; rank 0 raises a moment later, because of it."""
    if worker.rank == 1:
        raise ValueError("bad label 11")
    raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")


@pytest.mark.parametrize("function", [fail_on_one, fail_both])
def test_the_root_cause_is_told_not_its_effect(function: Callable[..., Any], gangs: Callable[..., RayGang]) -> None:
    gang = gangs()
    value(run(gang, add_up, 1.0))
    with at_once():
        failed = run(gang, function)
        gang.close()
    assert isinstance(failed, Failed) and (failed.rank, failed.kind, failed.message) == (
        1,
        "ValueError",
        "bad label 11",
    )
    assert (
        failed.where
        == f"{Path(__file__).name}:{function.__code__.co_firstlineno + (2 if function is fail_on_one else 3)}"
    )
    with pytest.raises(RuntimeError, match="closed or broken"):
        gang.start(Task(add_up, 1.0, "ddp"))


def wait_for_peer(worker: Worker, seconds: float) -> None:
    """Rank 1 keeps rank 0 waiting in a collective."""
    if worker.rank == 1:
        time.sleep(seconds)
    worker.sum_(torch.zeros(1))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_lost_at_once_and_a_new_gang_works(victim: int, gangs: Callable[..., RayGang]) -> None:
    gang = gangs()
    ids = value(run(gang, processes))
    gang.start(Task(wait_for_peer, 60.0, "ddp"))
    assert gang.poll(0.2) is None
    with at_once():
        os.kill(ids[victim], signal.SIGKILL)
        lost = gang.poll(START)
        gang.close()
    assert isinstance(lost, Lost) and lost.rank == victim and f"pid {ids[victim]}" in lost.reason
    assert not any(map(psutil.pid_exists, ids))
    assert value(run(gangs(), add_up, 1.0)) == 3.0


def test_a_stopped_rank_is_noticed(gangs: Callable[..., RayGang]) -> None:
    gang = gangs(timeout=3)
    ids = value(run(gang, processes))
    gang.start(Task(wait_for_peer, 60.0, "ddp"))
    os.kill(ids[1], signal.SIGSTOP)
    began = time.monotonic()
    lost = gang.poll(START)
    assert lost == Lost(1, "no sign of life from rank 1 for 3 s")
    assert 2 < time.monotonic() - began < AT_ONCE
    gang.close()
    assert not any(map(psutil.pid_exists, ids))


def test_a_long_task_is_not_mistaken_for_a_stopped_one(gangs: Callable[..., RayGang]) -> None:
    gang = gangs(timeout=3)
    assert isinstance(run(gang, spin, 8.0), Done)


def spin(worker: Worker, seconds: float) -> None:
    """Holds the interpreter, as training does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.ones(64, 64) @ torch.ones(64, 64)


def die(worker: Worker, argument: Any) -> None:
    os._exit(3)


def test_a_gang_that_lost_its_rank_before_the_first_poll(gangs: Callable[..., RayGang]) -> None:
    assert isinstance(run(gangs(), die), Lost)


class LateRank(Rank):
    """Its machine takes longer to start."""

    def __init__(self, rank: int, size: int, gpus: int):
        time.sleep(8.0 * rank)
        super().__init__(rank, size, gpus)


def limit(worker: Worker, argument: Any) -> float:
    world: Any = torch.distributed.group.WORLD
    return float(world._get_backend(torch.device("cpu")).options._timeout.total_seconds())


@pytest.mark.slow
def test_ranks_wait_for_one_that_is_slow_to_start(
    gangs: Callable[..., RayGang], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than for one in a collective."""
    monkeypatch.setattr("cluster.gang.Rank", LateRank)
    assert run(gangs(timeout=4), limit) == Done(4.0)


# ----------------------------------------------------------------------------------------------------------- cluster


def test_capacity_counts_whole_gangs() -> None:
    total = max(os.cpu_count() or 1, CPUS)
    assert capacity(2) == total // 2
    assert capacity(1, threads=total) == 1


@pytest.mark.parametrize("workers, threads, gpus", [(64, 1, 0), (1, 1000, 0), (1, 1, 99)])
def test_what_the_cluster_can_never_hold_is_refused_at_once(workers: int, threads: int, gpus: int) -> None:
    with at_once(), pytest.raises(CapacityError) as caught:
        capacity(workers, threads, gpus)
    need = f"no room for {workers} workers x ({threads} CPUs, {gpus} GPUs): "
    have = f"1 nodes have {max(os.cpu_count() or 1, CPUS)} CPUs, {torch.cuda.device_count()} GPUs in all"
    assert str(caught.value) == need + have


def test_one_rank_alone_needs_no_process_group(gangs: Callable[..., RayGang]) -> None:
    gang = RayGang(1, timeout=30)
    try:
        assert value(run(gang, add_up, 2.0)) == value(run(LocalGang(), add_up, 2.0)) == 2.0
    finally:
        gang.close()


GUEST = """
from cluster.gang import RayGang, connect
from cluster.tasks import Task
from tests.cluster.test_gang import add_up
if __name__ == "__main__":
    connect(64)
    gang = RayGang(2, timeout=30)
    gang.start(Task(add_up, 1.0, "ddp"))
    print(gang.poll(60).value)
"""


def test_a_cluster_at_ray_address_is_used_and_left_running(warm: RayGang) -> None:
    address = ray.get_runtime_context().gcs_address
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    guest = subprocess.run([sys.executable, "-c", GUEST], capture_output=True, text=True, env=env, cwd=ROOT, timeout=90)
    assert guest.stdout == "3.0\n", guest.stderr
    assert value(run(warm, add_up, 1.0)) == 3.0


DRIVER = """
import time
from cluster.gang import RayGang, connect
from cluster.tasks import Task
from tests.cluster.test_gang import processes, wait_for_peer
if __name__ == "__main__":
    connect(2)
    gang = RayGang(2, timeout=30)
    gang.start(Task(processes, None, "ddp"))
    print("ids", *gang.poll(60).value, flush=True)
    gang.start(Task(wait_for_peer, 600.0, "ddp"))
    time.sleep(600)
"""


NO_ADDRESS = [None, pytest.param("", marks=pytest.mark.slow), pytest.param("local", marks=pytest.mark.slow)]


@pytest.mark.parametrize("address", NO_ADDRESS)
def test_cluster_is_on_loopback_and_does_not_outlive_a_killed_driver(tmp_path: Path, address: str | None) -> None:
    """Whatever word for "none" stands in the environment, of which nothing was set by this very process."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_ADDRESS": address or ""}
    env |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    if address is None:
        del env["RAY_ADDRESS"]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    family: list[psutil.Process] = []
    try:
        assert driver.stdout is not None
        words = driver.stdout.readline().split()
        family = psutil.Process(driver.pid).children(recursive=True)
        assert words[0] == "ids" and {int(word) for word in words[1:]} <= {p.pid for p in family}
        listening = [c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
        assert listening and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
        driver.kill()
        driver.wait()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        assert not (tmp_path / ".ray").exists()  # no token for other clusters to trip over
    finally:
        for process in [p for p in family if p.is_running()]:
            process.kill()
        driver.kill()
        driver.communicate()


def commands(driver: psutil.Popen) -> str:
    """Those of all that it has started."""
    try:
        return "\n".join(" ".join(p.cmdline()) for p in driver.children(recursive=True))
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.parametrize("later", [0.3, 1.0])
def test_a_driver_killed_while_its_cluster_starts_leaves_nothing(later: float) -> None:
    """Seconds after the raylet: what it starts has not come so far, or does not stand in the driver's books."""
    driver = psutil.Popen([sys.executable, "-c", DRIVER], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
    try:
        while not (found := re.search(r"raylet --raylet_socket_name.* --temp_dir=(\S+)", commands(driver))):
            assert driver.poll() is None
        time.sleep(later)
    finally:
        driver.kill()
        driver.wait()
    deadline = time.monotonic() + 10
    directory = found[1]
    while (left := family(directory)) or Path(directory).exists():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
