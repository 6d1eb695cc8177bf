"""A gang of the ranks that torchrun started: rank 0 drives the study and takes part in it, the others follow.

Orders and reports go through torchrun's own store. A rank that fails closes its connections: ranks that wait for it in a
collective get an error within milliseconds, and all form a new process group for the next task. A rank whose process is
gone cannot be replaced: then torchrun ends all, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from cluster.actor import Rank, backend, interface
from cluster.tasks import ClusterError, Done, Failed, Lost, Outcome, Task, attempt, root_cause

START_LIMIT = timedelta(seconds=60)  # to reach torchrun's store
GLANCE = 0.01  # seconds between two looks into the store
PARENT = 0.5  # seconds between two looks at torchrun itself


def started() -> bool:
    """Whether torchrun started this process."""
    return {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def following() -> bool:
    """Whether torchrun started this process, and rank 0 drives the study elsewhere."""
    return started() and os.environ["RANK"] != "0"


@dataclass(frozen=True)
class Order:
    """What rank 0 tells the others to do."""

    group: int  # number of the process group to do it in
    timeout: float  # seconds, of collectives
    path: list[str]  # where modules are found
    task: bytes  # pickled


class Member:
    """One rank: the store, a process group, and what runs tasks."""

    def __init__(self) -> None:
        from torch import distributed as dist

        store, self.rank, self.size = next(iter(dist.rendezvous("env://", timeout=START_LIMIT)))
        self.store: Any = dist.PrefixStore(f"bigbatch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.worker = Rank(self.rank, self.size, 0)
        self.worker.device = device()
        self.group: int | None = None
        self.before: set[int] = set()
        self.orders = 0  # given or obeyed so far

    def put(self, key: str, value: Any) -> None:
        self.store.set(key, pickle.dumps(value))

    def get(self, key: str, limit: float | None = None) -> Any:
        """Waits for a value, in Python so that signals are heard. Raises ConnectionError after `limit` seconds."""
        end = time.monotonic() + (limit or float("inf"))
        while not self.store.check([key]):
            if time.monotonic() > end:
                raise ConnectionError(f"no sign of life from rank {key.rpartition('/')[2]} for {limit:g} s")
            time.sleep(GLANCE)
        return pickle.loads(self.store.get(key))  # written by our own processes

    def obey(self, order: Order) -> Done | Failed:
        done = attempt(self.rank, lambda: self._obey(order))
        outcome: Done | Failed = done.value if isinstance(done, Done) else done
        if isinstance(outcome, Failed):
            self.leave()
        return outcome

    def _obey(self, order: Order) -> Done | Failed:
        sys.path.extend(place for place in order.path if place not in sys.path)
        if order.group != self.group:
            self.join(order.group, order.timeout)
        return self.worker.run(pickle.loads(order.task))

    def join(self, group: int, timeout: float) -> None:
        """Enter a process group once all ranks are there."""
        from torch import distributed as dist

        self.leave()
        self.put(f"here/{group}/{self.rank}", True)
        for rank in range(self.size):
            self.get(f"here/{group}/{rank}", timeout)
        self.group, self.before = group, connections()
        if os.environ.get("LOCAL_WORLD_SIZE") == str(self.size):  # one machine: talk on loopback
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface({""}, ""))
        store, limit = dist.PrefixStore(f"group/{group}", self.store), timedelta(seconds=timeout)
        kind = backend(self.worker.device)
        dist.init_process_group(kind, store=store, rank=self.rank, world_size=self.size, timeout=limit)

    def leave(self) -> None:
        """Leave the process group in whatever state it is. Closing the connections oneself is what tells the peers:
        `destroy_process_group` and even `abort` leave them open while anything still refers to the group."""
        from torch import distributed as dist

        if self.group is None:
            return
        self.group = None
        for number in connections() - self.before:
            with socket.socket(fileno=os.dup(number)) as connection, contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        gc.collect()  # DDP refers to the group in cycles
        if dist.is_initialized():
            dist.destroy_process_group()


def device() -> Any:
    """A GPU of its own for each rank of this machine where there are enough, else the CPU."""
    import torch

    if torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return torch.device("cpu")
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def connections() -> set[int]:
    """File descriptors of this process's TCP connections."""
    return {c.fd for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED}


@cache
def member() -> Member:
    return Member()


class TorchrunGang:
    """All ranks of torchrun, seen from rank 0, which runs each task within `poll`. See `cluster.tasks.Gang`."""

    name, waits = "torchrun", False
    numbers = iter(range(2**31))  # of process groups

    def __init__(self, workers: int, timeout: float = 300):
        if not started():
            command = f"torchrun --standalone --nproc-per-node {workers} -m orchestrator run RECIPE"
            raise ClusterError(f"launcher torchrun takes the ranks that it was started with: {command}")
        self.size, self.timeout = int(os.environ["WORLD_SIZE"]), timeout
        if self.size != workers:
            told = f"torchrun started {self.size} processes, but cluster.workers is {workers}"
            raise ClusterError(f"{told}: use --nproc-per-node {workers}, or set cluster.workers: {self.size}")
        self.member, self.group = member(), next(self.numbers)
        self.task: Task | None = None
        self.lost = False

    def start(self, task: Task) -> None:
        self.task = task

    def poll(self, timeout: float) -> Outcome | None:
        task, self.task = self.task, None
        return self._run(task) if task else None

    def _run(self, task: Task) -> Outcome:
        member = self.member
        number, member.orders = member.orders, member.orders + 1
        order = Order(self.group, self.timeout, sys.path, pickle.dumps(task))
        member.put(f"order/{number}", order)
        reports = [member.obey(order)]
        for rank in range(1, self.size):
            try:
                reports.append(member.get(f"report/{number}/{rank}", self.timeout))
            except ConnectionError as error:
                self.lost = True
                return Lost(rank, str(error))
        member.worker.reset()
        failures = [report for report in reports if isinstance(report, Failed)]
        return root_cause(failures) if failures else reports[0]

    def close(self) -> None:
        self.member.leave()


def follow() -> int:
    """The life of the ranks other than 0: obey until told to end. Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_torchrun()
    member = Member()
    try:
        while (order := member.get(f"order/{member.orders}")) is not None:
            outcome = member.obey(order)
            member.put(f"report/{member.orders}/{member.rank}", outcome)
            member.orders += 1
            member.worker.reset()
    except RuntimeError:  # the store has gone, and torchrun with it
        return 1
    member.leave()
    return 0


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Around all that rank 0 does: at the end the other ranks are told to end too. Nothing, if torchrun is not there."""
    if not started():
        yield
        return
    end_with_torchrun()
    try:
        yield
    except SystemExit as end:
        if end.code:
            blame(f"bigbatch ended with exit code {end.code}: its own lines above tell why")
        raise
    finally:
        with contextlib.suppress(RuntimeError):  # no store, no followers
            member().put(f"order/{member().orders}", None)


def end_with_torchrun() -> None:
    """End in order when torchrun was killed: nobody else would tell."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def blame(cause: str) -> None:
    """Have torchrun name `cause` in the last lines that it prints; the first cause stands."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and not Path(file).exists():
        detail = {"py_callstack": cause, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": cause, "extraInfo": detail}}))
