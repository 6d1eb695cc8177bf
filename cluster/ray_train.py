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
import tempfile
import threading
from pathlib import Path
from typing import Any, Literal

from cluster.actor import Rank
from cluster.mirror import make_sign, remove_sign
from cluster.session import gpus_each, ray
from cluster.tasks import ClusterError, Done, Failed, Lost, Outcome, Task, attempt, root_cause

GRACE = 1.0  # seconds for other ranks to report after one has failed
STOP_LIMIT = 10.0  # seconds for workers to end

remote: Any = ray.remote  # its types lose the actor's methods


class Mailbox:
    """An actor between the driver and the ranks. Its methods wait without holding up each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tasks: list[Task | None] = []  # None: there are no more
        self.reports: dict[int, Done | Failed] = {}  # on the newest task, by rank
        self.workers: dict[int, Any] = {}  # Ray Train's own actors, by rank
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

    async def seat(self, rank: int, worker: Any) -> None:
        self.workers[rank] = worker

    async def seated(self) -> dict[int, Any]:
        return self.workers


def work(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker, in the process group that it has made."""
    import ray.train.torch

    mailbox, context = config["mailbox"], ray.train.get_context()
    rank = Rank(context.get_world_rank(), context.get_world_size(), 0)
    rank.device = ray.train.torch.get_device()
    mailbox.seat.remote(rank.rank, ray.get_runtime_context().current_actor)
    number, sign = 0, config["sign"]
    shared = sign is None or sign.exists()
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
        try:
            importlib.import_module("ray.train")
        except ImportError:
            raise ClusterError('launcher ray_train needs Ray Train: pip install "ray[train]"') from None
        self.size, self.name, self.strategy = size, name, placement.upper()
        self.sign = make_sign(folder)
        self.folder = tempfile.mkdtemp(prefix="bigbatch-train-")  # Ray Train wants one; nothing of ours is kept there
        self.mailbox = remote(num_cpus=0)(Mailbox).remote(size)
        self.pending: Any = None
        self.error: Exception | None = None
        trainer = self._trainer(threads, gpus_each(size) if gpus is None else gpus, timeout)
        self.fit = threading.Thread(target=self._fit, args=(trainer,), daemon=True)
        self.fit.start()

    def _trainer(self, threads: int, gpus: int, timeout: float) -> Any:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        each = {"CPU": threads, "GPU": gpus} if gpus else {"CPU": threads}
        return TorchTrainer(
            work,
            train_loop_config={"mailbox": self.mailbox, "sign": self.sign},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=math.ceil(timeout)),
            scaling_config=ScalingConfig(
                num_workers=self.size,
                use_gpu=bool(gpus),
                resources_per_worker=each,
                placement_strategy=self.strategy,
            ),
            run_config=RunConfig(name=self.name, storage_path=self.folder),
        )

    def _fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except Exception as error:
            self.error = error

    def start(self, task: Task) -> None:
        self.pending = self.mailbox.run.remote(task)

    def poll(self, timeout: float) -> Outcome | None:
        alive = self.fit.is_alive()
        ready, _ = ray.wait([self.pending], timeout=timeout if alive else 2 * GRACE)
        if not ready:
            return None if alive else self._lost()
        outcome: Done | Failed = ray.get(self.pending)
        self.pending = None
        if isinstance(outcome, Failed) and outcome.lost_peer:
            self.fit.join(STOP_LIMIT)
            return self._lost()
        return outcome

    def _lost(self) -> Lost:
        """The worker that died, not the one that missed it."""
        failures: dict[int, Exception] = getattr(self.error, "worker_failures", {})
        dead = [rank for rank, error in failures.items() if type(error).__name__ == "WorkerHealthCheckFailedError"]
        if dead:
            return Lost(min(dead), f"the process of rank {min(dead)} died")
        return Lost(0, f"Ray Train ended: {str(self.error).strip().splitlines()[-1] if self.error else 'no error'}")

    def close(self) -> None:
        with contextlib.suppress(ray.exceptions.RayActorError):  # closed before
            self.mailbox.run.remote(None)  # idle workers end by themselves
            if self.pending is not None:
                for worker in ray.get(self.mailbox.seated.remote()).values():
                    ray.kill(worker)
        self.fit.join(STOP_LIMIT)
        ray.kill(self.mailbox)
        shutil.rmtree(self.folder, ignore_errors=True)
        remove_sign(self.sign)
