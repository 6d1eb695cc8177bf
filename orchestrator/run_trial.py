"""The function that a gang runs on every rank for one trial: from the trial's specification to its result."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster import stacks
from cluster.mirror import local, mirrored
from orchestrator.allocator import keep_freed_memory
from orchestrator.compose import compose
from orchestrator.environment import redact
from orchestrator.files import read_lines
from orchestrator.results import Deadline, outcome
from orchestrator.trial import Trial
from strategies.contract import Worker


@dataclass(frozen=True, slots=True)
class Assignment:
    """What the driver tells the workers about one trial."""

    trial: Trial
    directory: Path  # of the trial
    phases: Path  # where finished phases are kept
    data: Path | None = None  # the driver's parsed data set
    deadlines: tuple[Deadline, ...] = ()  # of the search that the trial belongs to

    def here(self) -> Assignment:
        """The same with paths as this process finds them; the data set is left out where the node looks for its own."""
        data = local(self.data) if mirrored() and self.data else None
        return replace(self, directory=local(self.directory), phases=local(self.phases), data=data)


def run_trial(worker: Worker, assignment: Assignment) -> dict[str, Any]:
    """Trains the trial and returns its result (see docs/architecture.md, result.json)."""
    here = assignment.here()
    with rank_log(here.directory / "logs" / f"rank_{worker.rank}.log"):
        return _run(worker, here)


def _run(worker: Worker, assignment: Assignment) -> dict[str, Any]:
    from orchestrator.trainer import Trainer

    start, began = time.time(), time.perf_counter()
    trial = assignment.trial
    if trial.speed.keep_memory:
        keep_freed_memory()
    job = job_of(worker, assignment)
    data_seconds = time.perf_counter() - began
    trainer = Trainer(job, worker)
    progress = trainer.run()
    trainer.rows.close()
    seconds = _seconds(progress, data_seconds, time.perf_counter() - began)
    timed = seconds["train"] is not None
    rows = read_lines(trainer.rows.path) if worker.rank == 0 else []
    return {
        **_names(trial),
        "status": progress.status,
        "steps": progress.steps,
        "epochs": progress.epochs,
        "examples": progress.examples,
        "flops": progress.flops,
        **outcome(rows, trial.workload.target, timed),
        "seconds": seconds,
        "examples_per_second": progress.examples / progress.train_seconds if timed else None,
        "micro_batch": progress.micro_batch,
        "patch_convolutions": progress.patch_convolutions,
        "parameters": progress.parameters,
        "reused": not timed,
        "phases": {"trained": progress.phase + 1 - progress.reused_phases, "reused": progress.reused_phases},
        "workers": worker.size,
        "roles": worker.roles,
        "threads": trial.cluster.threads,
        "precision": trial.precision,
        "device": _device_name(worker),
        "began": start,
        "ended": time.time(),
    }


def _seconds(progress: Any, data: float, wall: float) -> dict[str, float | None]:
    """Where the time went; none for training that was done elsewhere."""
    if progress.reused_steps:
        return {"startup": wall - data, "data": data, "train": None, "eval": None, "save": None}
    train, evaluation, save = progress.train_seconds, progress.eval_seconds, progress.save_seconds
    startup = max(0.0, wall - data - train - evaluation - save)
    return {"startup": startup, "data": data, "train": train, "eval": evaluation, "save": save}


def _names(trial: Trial) -> dict[str, Any]:
    names = {"trial": trial.id, "arm": trial.arm, "batch": trial.base.batch, "seed": trial.seed}
    return names | labels(trial)


def labels(trial: Trial) -> dict[str, Any]:
    """What a result says of the trial's place in the study; it may change without the trial being trained again."""
    return {"arm": trial.arm, "point": trial.point, "role": trial.role, "edge": trial.edge}


def failure(trial: Trial, error: str) -> dict[str, Any]:
    """The result of a trial that ended in an error."""
    return {**_names(trial), "status": "failed", "error": error, "workers": trial.cluster.workers}


def job_of(worker: Worker, assignment: Assignment) -> Any:
    """The trainer's `Job`: the plan composed, the data set in memory."""
    import torch

    from orchestrator.phases import PhaseStore
    from orchestrator.trainer import Job
    from orchestrator.workloads import open_dataset

    trial = assignment.trial
    dtype = torch.float64 if trial.precision == "fp64" else torch.float32
    dataset = open_dataset(trial.workload, trial.seed, worker.device, dtype, assignment.data)
    limit, interval = trial.base.micro_batch, trial.checkpoint.seconds
    return Job(
        plan=compose(trial, dataset.examples),
        dataset=dataset,
        seed=trial.seed,
        directory=assignment.directory,
        store=PhaseStore(assignment.phases),
        context=trial.context(),
        evaluate=trial.workload.evaluate,
        target=trial.workload.target,
        deadlines=assignment.deadlines,
        micro_batch=None if limit == "auto" else limit,
        dtype=dtype,
        log_steps=trial.log_steps,
        speed=trial.speed,
        save_seconds=None if interval == "auto" else interval,
        mtbf=trial.checkpoint.mtbf,
        keep=trial.checkpoint.keep,
    )


def _device_name(worker: Worker) -> str:
    import torch

    if worker.device.type == "cuda":
        return torch.cuda.get_device_name(worker.device)
    return "cpu"


class Log(io.TextIOWrapper):
    """A text file that keeps no secrets, and drops what the disk does not take: no print ends a training."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(redact(text))
        return len(text)


@contextlib.contextmanager
def rank_log(path: Path) -> Iterator[None]:
    """What the rank prints goes into its own file, across attempts; and where it stands, should it hang."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # no buffer between, which would hold what could not be written and fail when it is closed
    with Log(open(path, "ab", buffering=0), encoding="utf-8", write_through=True) as file:
        print(f"# pid {os.getpid()} at {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file)
        with stacks.written_to(file), contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                yield
            except Exception:
                import traceback

                traceback.print_exc(file=sys.stderr)
                raise
