"""One rank of a gang: a process of its own that joins the process group once and then runs task after task."""

from __future__ import annotations

import gc
import os
import signal
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from cluster import mirror, stacks
from cluster.tasks import ClusterError, Done, Failed, Task, attempt

START_LIMIT = 120.0  # seconds in which the ranks of a gang meet, where `timeout` is shorter: one may be slow to start
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # variables; what a node sets itself is kept


@dataclass(frozen=True)
class Seat:
    """Where a rank runs."""

    rank: int
    node: str  # Ray's id
    host: str
    pid: int
    sees_files: bool  # of the driver


class Rank:
    """The methods that the driver calls. `ping` runs in a thread of its own (see `RayGang`), the others one by one."""

    def __init__(self, rank: int, size: int, gpus: int):
        stacks.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked in all that a private cluster starts
        import torch  # the slow part of starting, in all ranks at once

        self.rank, self.size = rank, size
        self.device = torch.device("cuda", 0) if gpus else torch.device("cpu")
        self.store: Any = None
        self.joined: Done | Failed | None = None
        self.tasks = 0

    def bind(self, timeout: float) -> tuple[str, int]:
        """Rank 0 only: serve the rendezvous on a port that the system picks. -> its address. `timeout`: as for `join`."""
        import ray
        from torch.distributed import TCPStore

        address = ray.util.get_node_ip_address()
        listener = socket.create_server((address, 0))  # on this address only: by itself, TCPStore listens on all
        port, limit = listener.getsockname()[1], timedelta(seconds=start_limit(timeout))
        serve: dict[str, Any] = {"wait_for_workers": False, "master_listen_fd": listener.detach()}
        self.store = TCPStore(address, port, self.size, True, limit, **serve)
        return address, port

    def join(self, address: tuple[str, int], timeout: float, sign: Path | None = None) -> Done | Failed:
        """Enter the process group; collectives fail after `timeout` seconds. `sign`: a file that shows whether this node
        sees the driver's. -> Done(Seat)."""
        self.joined = attempt(self.rank, lambda: self._join(address, timeout, sign))
        gc.freeze()  # what is loaded by now stays: collections between tasks need not visit it
        return self.joined

    def _join(self, address: tuple[str, int], timeout: float, sign: Path | None) -> Seat:
        import ray

        if self.size > 1:
            from torch import distributed as dist

            patience, limit = timedelta(seconds=start_limit(timeout)), timedelta(seconds=timeout)
            store = self.store or dist.TCPStore(*address, self.size, False, patience)
            own = ray.util.get_node_ip_address()
            store.set(f"node/{self.rank}", own)
            talk_through({store.get(f"node/{rank}").decode() for rank in range(self.size)}, own)
            store.set_timeout(limit)  # all are there: from here on nobody is waited for longer than in a collective
            kind = backend(self.device)
            dist.init_process_group(kind, store=store, rank=self.rank, world_size=self.size, timeout=limit)
        sees = sign is None or sign.exists()
        return Seat(self.rank, ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid(), sees)

    def run(self, task: Task, moved: Path | None = None) -> Done | Failed:
        """The task's outcome; only rank 0 sends its value. `moved`: see `cluster.mirror`."""
        if isinstance(self.joined, Failed):
            return self.joined
        mirror.moved = moved
        outcome = attempt(self.rank, lambda: self._run(task))
        return outcome if self.rank == 0 or isinstance(outcome, Failed) else Done(None)

    def _run(self, task: Task) -> Any:
        import torch

        from cluster.engines import make_worker

        torch.set_num_threads(task.threads)
        worker = make_worker(task.engine, task.options, task.precision, self.rank, self.size, self.device)
        return task.function(worker, task.argument)

    def reset(self) -> None:
        """Between tasks: free what the last one left in cycles (DDP does), and undo the global settings it may have made."""
        import torch

        torch.set_default_dtype(torch.float32)
        gc.collect()
        self.tasks += 1
        if self.tasks == 1:
            gc.freeze()  # and so do the modules that a first task loads

    def ping(self) -> None:
        """Answered while a task runs, unless the process is stopped."""


def backend(device: Any) -> str:
    """What carries collectives between ranks on `device`."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def start_limit(timeout: float) -> float:
    """Seconds for which the ranks wait for each other before there is a process group."""
    return max(START_LIMIT, timeout)


def talk_through(nodes: set[str], own: str) -> None:
    """Have gloo and NCCL use `interface(nodes, own)`, each unless this node's environment names another one."""
    unset = [variable for variable in INTERFACES if not os.environ.get(variable)]
    if unset:
        os.environ |= dict.fromkeys(unset, interface(nodes, own))


def interface(nodes: set[str], own: str) -> str:
    """The network interface through which the ranks talk: loopback if all are on one node, else the one that holds
    the address `own`, by which the cluster knows this node."""
    wanted, there = "127.0.0.1" if len(nodes) == 1 else own, psutil.net_if_addrs()
    for name, held in there.items():
        if any(a.address == wanted for a in held):
            return name
    found = f"none of its network interfaces ({', '.join(sorted(there))}) holds its address {wanted}"
    raise ClusterError(f"{socket.gethostname()}: {found}; name one in {' and '.join(INTERFACES)} on this node")
