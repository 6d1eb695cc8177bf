"""Gangs of Ray Train: one `TorchTrainer.fit()` whose workers take task after task from a mailbox.

Ray Train places the workers, makes the process group and notices when a worker dies; tasks run as in any other gang.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import os
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

import psutil

from cluster import stacks
from cluster.actor import Rank, Seat
from cluster.gang import Pulse, kill, processes_here
from cluster.mirror import make_sign, remove_sign
from cluster.placement import PENDING, Room
from cluster.session import gpus_each, of_ranks, ray
from cluster.tasks import ClusterError, Done, Failed, Lost, Outcome, Task, attempt, root_cause

GRACE = 1.0  # seconds for other ranks to report after one has failed
STOP_LIMIT = 10.0  # seconds for workers to end
LOOK = 0.25  # seconds between two looks at whether they have

remote: Any = ray.remote  # its types lose the actor's methods


class Mailbox:
    """An actor between the driver and the ranks. Its methods wait without holding up each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tasks: list[Task | None] = []  # None: there are no more
        self.reports: dict[int, Done | Failed] = {}  # on the newest task, by rank
        self.seats: dict[int, tuple[Seat, Any]] = {}  # with Ray Train's own actors, by rank
        self.news = asyncio.Condition()

    async def run(self, task: Task | None) -> Done | Failed | None:
        """Give a task to all ranks; its outcome."""
        async with self.news:
            self.tasks.append(task)
            self.reports = {}
            self.news.notify_all()
            await self.news.wait_for(lambda: task is None or len(self.reports) == self.size or self.failures())
        if self.failures() and len(self.reports) < self.size:
            await asyncio.sleep(GRACE)
        return root_cause(self.failures()) if self.failures() else self.reports.get(0)

    def failures(self) -> list[Failed]:
        return [report for report in self.reports.values() if isinstance(report, Failed)]

    async def take(self, number: int) -> Task | None:
        async with self.news:
            await self.news.wait_for(lambda: number < len(self.tasks))
        return self.tasks[number]

    async def report(self, rank: int, report: Done | Failed) -> None:
        async with self.news:
            self.reports[rank] = report
            self.news.notify_all()

    async def seat(self, seat: Seat, worker: Any) -> None:
        async with self.news:
            self.seats[seat.rank] = (seat, worker)
            self.news.notify_all()

    async def seated(self, all_of_them: bool) -> list[tuple[Seat, Any]]:
        """In the order of ranks: those there are, or all once they are there."""
        async with self.news:
            await self.news.wait_for(lambda: not all_of_them or len(self.seats) == self.size)
        return [self.seats[rank] for rank in sorted(self.seats)]


def work(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker, in the process group that it has made."""
    import ray.train.torch

    mailbox, context = config["mailbox"], ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), 0)
    rank.device = ray.train.torch.get_device()
    number, sign, here = 0, config["sign"], ray.get_runtime_context()
    shared = sign is None or sign.exists()
    seat = Seat(rank.rank, here.get_node_id(), socket.gethostname(), os.getpid(), shared)
    mailbox.seat.remote(seat, here.current_actor)
    while (task := ray.get(mailbox.take.remote(number))) is not None:
        report = rank.run(task) if shared else attempt(rank.rank, lambda: refuse(sign.parent))
        ray.get(mailbox.report.remote(rank.rank, report))
        if isinstance(report, Failed):
            raise RuntimeError(f"{report.kind}: {report.message}")  # Ray Train then ends the other workers
        rank.reset()
        number += 1


def refuse(folder: Path) -> None:
    raise ClusterError(f"launcher ray_train needs a file system that all nodes share: {folder} is not the driver's here; "
                       "use launcher: gang")  # fmt: skip


class TrainRoom(Room):
    """Seen from outside: which group of places Ray Train has made for a gang, it does not tell."""

    seated = False

    def state(self) -> str:
        if self.seated:
            return "CREATED"
        groups = ray.util.placement_group_table().values()
        alike = {group["state"] for group in groups if list(group["bundles"].values()) == self.bundles}
        return next((state for state in PENDING if state in alike), "")


class TrainGang:
    """The workers of one `TorchTrainer`. See `cluster.tasks.Gang` and, for the arguments, `cluster.gang.RayGang`."""

    def __init__(
        self,
        size: int,
        threads: int = 1,
        gpus: int | None = None,
        timeout: float = 300,
        name: str = "gang",
        placement: Literal["pack", "spread"] = "pack",
        folder: Path | None = None,
    ):
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths stay what they are
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout)  # its own look at signs of life
        try:
            importlib.import_module("ray.train")
        except ImportError:
            raise ClusterError('launcher ray_train needs Ray Train: pip install "ray[train]"') from None
        self.size, self.name, self.timeout, self.strategy = size, name, timeout, placement.upper()
        gpus = gpus_each(size) if gpus is None else gpus
        self.sign = make_sign(folder)
        self.folder = tempfile.mkdtemp(prefix="bigbatch-train-")  # Ray Train wants one; nothing of ours is kept there
        self.mailbox = remote(num_cpus=0)(Mailbox).remote(size)
        self.pending: Any = None  # the call that gives the outcome of the task
        self.whole = True  # no task has been given since one was done
        self.error: BaseException | None = None
        self.room = TrainRoom(name, size, threads, gpus)
        self.seating = self.mailbox.seated.remote(True)
        self.processes: list[psutil.Process] = []  # of the ranks on this machine
        self.pulse = Pulse([], timeout)
        trainer = self._trainer(threads, gpus)
        self.fit = threading.Thread(target=self._fit, args=(trainer,), daemon=True)
        self.fit.start()

    def _trainer(self, threads: int, gpus: int) -> Any:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        each = {"CPU": threads, "GPU": gpus} if gpus else {"CPU": threads}
        return TorchTrainer(
            work,
            train_loop_config={"mailbox": self.mailbox, "sign": self.sign},
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=math.ceil(self.timeout)
            ),
            scaling_config=ScalingConfig(
                num_workers=self.size,
                use_gpu=bool(gpus),
                resources_per_worker=each,
                placement_strategy=self.strategy,
            ),
            run_config=RunConfig(  # its types are those of an older one
                name=self.name,
                storage_path=self.folder,
                worker_runtime_env=of_ranks(),  # type: ignore[call-arg]
            ),
        )

    def _fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except (Exception, SystemExit) as error:  # Ray's SystemExit: the driver has left the cluster
            self.error = error

    @property
    def waits(self) -> bool:
        self._seat()
        return self.room.waits

    def _seat(self) -> None:
        """Once all ranks have their places, watch them."""
        if not self.room.seated and ray.wait([self.seating], timeout=0)[0]:
            seats, workers = zip(*ray.get(self.seating), strict=True)
            self.room.seated, self.processes = True, processes_here(seats)
            self.pulse = Pulse([worker.__ray_ready__.remote for worker in workers], self.timeout)
            self.pulse.alive |= set(range(self.size))  # each has told its place

    def start(self, task: Task) -> None:
        self.whole, self.pending = False, self.mailbox.run.remote(task)

    def poll(self, timeout: float) -> Outcome | None:
        limit = time.monotonic() + timeout
        while True:
            left = max(0.0, limit - time.monotonic())
            outcome = self._collect(min(self.pulse.interval, left)) or self._silent()
            if outcome is not None or not left:
                self.whole = isinstance(outcome, Done)
                return outcome

    def _collect(self, timeout: float) -> Outcome | None:
        alive = self.fit.is_alive()
        ready, _ = ray.wait([self.pending], timeout=timeout if alive else 2 * GRACE)
        if not ready:
            return None if alive else self._lost()
        outcome: Done | Failed = ray.get(self.pending)
        self.pending = None
        return self._lost_peer(outcome) if isinstance(outcome, Failed) and outcome.lost_peer else outcome

    def _silent(self) -> Lost | None:
        """A rank without a sign of life. While there is no room for the ranks, that is told."""
        self._seat()
        self.room.seconds()
        silent = self.pulse.silent()
        if silent:
            stacks.ask(self.processes)
        return silent

    def _lost_peer(self, failed: Failed) -> Lost:
        """Ray Train or its own silence will soon tell which rank the failed one could not reach."""
        limit = time.monotonic() + STOP_LIMIT
        while self.fit.is_alive() and time.monotonic() < limit:
            if silent := self._silent():
                return silent
            self.fit.join(LOOK)
        return self._lost(f"rank {failed.rank} could not reach the others: {failed.message}")

    def _lost(self, otherwise: str = "no error") -> Lost:
        """The worker that died or was silent, not the one that missed it."""
        failures: dict[int, Exception] = getattr(self.error, "worker_failures", {})
        dead = [rank for rank, error in failures.items() if type(error).__name__.startswith("WorkerHealthCheck")]
        if dead:
            return Lost(min(dead), f"the process of rank {min(dead)} died")
        return Lost(0, f"Ray Train ended: {str(self.error).strip().splitlines()[-1] if self.error else otherwise}")

    def close(self) -> None:
        with contextlib.suppress(ray.exceptions.RayActorError):  # closed before
            self.mailbox.run.remote(None)  # idle workers end by themselves
            if not self.whole:
                self._kill()
        if not self.room.waits:
            self.fit.join(STOP_LIMIT)
        kill(self.processes)
        ray.kill(self.mailbox)
        shutil.rmtree(self.folder, ignore_errors=True)
        remove_sign(self.sign)

    def _kill(self) -> None:
        for _, worker in ray.get(self.mailbox.seated.remote(False)):
            ray.kill(worker)
        kill(self.processes)
