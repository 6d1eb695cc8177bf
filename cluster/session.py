"""The Ray cluster that gangs run on: the user's, or a private one for this process. Ray is imported through this module."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil

from cluster import stacks
from cluster.address import address
from cluster.reaper import end, family
from cluster.tasks import CapacityError, ClusterError

OBJECT_STORE = 100 * 2**20  # bytes; tasks and results are small
KNOCK_LIMIT = 5.0  # seconds
GOODBYE = 0.2  # seconds in which this process takes its leave of Ray's
ENDING = {signal.SIGTERM, signal.SIGUSR1}  # what ends a study in order
ARENAS = "MALLOC_ARENA_MAX"  # of glibc
ANSWER_LIMIT = 120.0  # seconds for a node to start a process, which imports torch, and to answer

T = TypeVar("T")


def guard() -> None:
    """Set what Ray reads from the environment when it is imported. Without a token of our own, the cluster that we may
    start would write one to the home directory, and other clusters of the user would then ask for it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = "."  # else it prints its own remarks to stdout, log_to_driver or not
    if not address() and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault(
            "RAY_worker_niceness", "0"
        )  # Ray's 15 would have all else on the machine go before training
        os.environ.setdefault(ARENAS, "1")  # see `of_ranks`; what the cluster starts inherits it
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # one machine: listen on loopback only, on Linux too


guard()
try:
    import ray
except ModuleNotFoundError:
    raise ClusterError('several workers need Ray: pip install "bigbatch[ray]", or set launcher: solo') from None


def of_ranks() -> dict[str, Any]:
    """The `runtime_env` of ranks. They train in a thread that is not their first: glibc would give that one heaps of 64 MiB,
    map anew each time what is larger, and give back what is freed."""
    return {} if ARENAS in os.environ else {"env_vars": {ARENAS: "1"}}


reaper: subprocess.Popen[str] | None = None  # of the private cluster
directory = ""  # its files


def connect(cpus: int = 1) -> None:
    """Connect to the cluster at RAY_ADDRESS; without one, start a private cluster on this machine with at least `cpus` CPUs.

    Call it on the main thread: the private cluster ends with the thread that started it. Raises ClusterError.
    """
    stacks.listen()
    theirs = address()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if theirs:
            knock(theirs)
            ray.init(address=theirs, **quiet)
        else:
            start(cpus, quiet)
    except Exception as error:  # ray.init raises bare ones too
        disconnect()
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(f"no Ray cluster at {theirs or 'this machine'}: {line}") from None


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """A connection to the user's cluster for a question or two."""
    connect()
    try:
        yield
    finally:
        disconnect()


def at_a_worker(function: Callable[[], T], workers: int, threads: int) -> T:
    """What it gives on a node that holds a worker, also while the cluster is at work. Raises ClusterError."""
    capacity(workers, threads, 0)
    node = next(n for n in ray.nodes() if n["Alive"] and room(n["Resources"], threads, 0))
    there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
    try:
        return ray.get(ray.remote(**options)(lambda: function()).remote(), timeout=ANSWER_LIMIT)
    except ray.exceptions.RayError as error:
        line = str(error).strip().splitlines()[-1]
        raise ClusterError(f"node {node['NodeManagerAddress']} gave no answer: {line}") from None


def knock(address: str) -> None:
    """Raises OSError if nobody listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=KNOCK_LIMIT).close()


def start(cpus: int, quiet: dict[str, Any]) -> None:
    """A cluster for this process alone: loopback, no dashboard, a directory of its own, gone when this process is."""
    global reaper, directory
    directory = tempfile.mkdtemp(prefix="bigbatch-ray-", dir="/tmp")  # short: it holds unix sockets
    command = [sys.executable, "-P", str(Path(__file__).with_name("reaper.py"))]
    with deaf():
        reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True)
        assert reaper.stdin
        print(directory, file=reaper.stdin, flush=True)
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, cpus),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE,
            _temp_dir=directory,
            **quiet,
        )


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes that start within never hear what ends a study. Schedulers, systemd and `timeout` send it to all processes
    of a job: a driver whose cluster ends under it waits for a minute, and is then ended by Ray."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def disconnect() -> None:
    """Leave the cluster; end it if it is ours."""
    global reaper
    if not reaper:
        return ray.shutdown()
    own = family(directory)  # before Ray ends some of them, whose children could not be found then
    hurry = threading.Thread(target=end_once_left, args=(own,), daemon=True)  # a second Ctrl-C may end `shutdown`
    hurry.start()
    ray.shutdown()
    hurry.join()
    reaper.communicate()
    reaper = None


def end_once_left(own: set[psutil.Process]) -> None:
    """Ray asks its processes one by one to end, and waits a second for each: in vain where they are deaf."""
    while ray.is_initialized():
        time.sleep(GOODBYE / 10)
    time.sleep(GOODBYE)
    end(own)


def gpus_each(workers: int) -> int:
    """GPUs that each worker of a gang gets unless told otherwise: 1 where the cluster has enough of them, else 0."""
    return int(ray.cluster_resources().get("GPU", 0) >= workers)


def capacity(workers: int, threads: int = 1, gpus: int | None = None) -> int:
    """How many gangs the whole cluster holds side by side. Raises CapacityError if not even one."""
    gpus = gpus_each(workers) if gpus is None else gpus
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gangs = sum(room(node, threads, gpus) for node in nodes) // workers
    if not gangs:
        have = ", ".join(f"{sum(node.get(kind, 0) for node in nodes):g} {kind}s" for kind in ("CPU", "GPU"))
        each = f"({threads} CPUs, {gpus} GPUs)"
        raise CapacityError(f"no room for {workers} workers x {each}: {len(nodes)} nodes have {have} in all")
    return gangs


def room(node: dict[str, float], threads: int, gpus: int) -> int:
    """Workers that an empty node holds."""
    by_cpu = int(node.get("CPU", 0) // threads)
    return min(by_cpu, int(node.get("GPU", 0) // gpus)) if gpus else by_cpu
