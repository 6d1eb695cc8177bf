"""Plants faults in the processes of a study, each told by trial, rank, step and place, and proves that it happened.

    planted = plant(folder, [Fault("kill", "all_reduce", rank=1, step=20, trial="0123456789ab")])
    subprocess.run([...], env=os.environ | planted.env)
    assert planted.fired() == planted.faults

Every Python process under `env` starts with `arm`, which wraps the functions named in `PATCHES` once their module is
imported. A fault happens once, in whichever process gets there first, and leaves a file before it does. Nothing in the
product knows of it.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests import network

VARIABLE = "PLANTED_FAULTS"  # the folder; also how the processes of a study are found again
ROOT = Path(__file__).parents[1]
DRIVER = -1  # its rank
HOUR = 3600.0  # seconds

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
SIGNALS |= {"usr1": signal.SIGUSR1, "usr2": signal.SIGUSR2}
ERRORS: dict[str, Callable[[], Exception]] = {
    "user": lambda: ValueError("the planted error"),
    "memory": lambda: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "disk": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "io": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    "read_only": lambda: OSError(errno.EROFS, os.strerror(errno.EROFS)),
    "port": lambda: OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)),
}


@dataclass(frozen=True)
class Fault:
    """`step`: optimizer steps taken so far; for places of the driver, calls so far. None: the first time there."""

    action: (
        str  # of SIGNALS, ERRORS or tests.network.ACTIONS; hang; short: half of a row; clock: an hour back from now on
    )
    place: str  # see PATCHES
    rank: int = 0
    step: int | None = None
    trial: str | None = None  # None: whichever


@dataclass(frozen=True)
class Planted:
    folder: Path
    faults: list[Fault]

    @property
    def env(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
        return {VARIABLE: str(self.folder), "PYTHONPATH": path}

    def fired(self) -> list[Fault]:
        return [fault for i, fault in enumerate(self.faults) if (self.folder / f"{i}.fired").exists()]

    def left(self) -> list[psutil.Process]:
        """Processes of the study that are still there, whoever their parent is by now."""
        return [p for p in psutil.process_iter() if alive(p) and environment(p).get(VARIABLE) == str(self.folder)]


def plant(folder: Path, faults: Sequence[Fault] = ()) -> Planted:
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text("from tests import faults\n\nfaults.arm()\n")
    (folder / "faults.json").write_text(json.dumps([dataclasses.asdict(fault) for fault in faults]))
    return Planted(folder, list(faults))


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


# ------------------------------------------------------------------------------------------- in the study's processes


class Here:
    """Where this process stands."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.faults = [Fault(**fields) for fields in json.loads((folder / "faults.json").read_text())]
        self.trial: str | None = None
        self.rank = DRIVER
        self.progress: Any = None
        self.writing: str | None = None  # what the names of places begin with while files are written
        self.calls: dict[str, int] = {}  # of places without steps

    def at(self, place: str, rank: int | None = None, trial: str | None = None) -> Fault | None:
        """The fault that is due in this place, if there is one; from now on it has happened."""
        rank, trial = self.rank if rank is None else rank, trial or self.trial
        step = self.progress.steps if self.progress else self.calls.get(place, 0)
        self.calls[place] = self.calls.get(place, 0) + 1
        for i, fault in enumerate(self.faults):
            here = (fault.place, fault.rank) == (place, rank)
            if here and fault.trial in (None, trial) and fault.step in (None, step) and self._first(i, trial, step):
                return fault
        return None

    def _first(self, number: int, trial: str | None, step: int) -> bool:
        try:
            with open(self.folder / f"{number}.fired", "x") as file:
                file.write(f"{trial} step {step} pid {os.getpid()} at {time.time()}")
        except FileExistsError:
            return False
        return True

    def pass_by(self, place: str, rank: int | None = None, trial: str | None = None) -> None:
        strike(self.at(place, rank, trial))


def strike(fault: Fault | None) -> None:
    if fault is None:
        return
    if fault.action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.action])
    elif fault.action in network.ACTIONS:
        network.strike(fault.action, Path(os.environ[VARIABLE]))
    elif fault.action == "clock":
        time.time = lambda now=time.time: now() - HOUR  # type: ignore[assignment,misc]
    elif fault.action == "hang":
        while True:
            time.sleep(0.1)
    else:
        raise ERRORS[fault.action]()


def patch_trainer(module: Any, here: Here) -> None:
    def step(original: Any, run: Any) -> None:
        here.trial, here.rank, here.progress = run.job.directory.name, run.worker.rank, run.progress
        network.tell(here.folder)
        here.pass_by("step")
        original(run)

    def train(original: Any, trainer: Any) -> Any:
        progress = original(trainer)
        here.pass_by("end", trainer.worker.rank, trainer.job.directory.name)
        here.progress = None
        return progress

    around(module.PhaseRun, "_step", step)
    around(module.Trainer, "run", train)
    before(module, "evaluate", lambda *_: here.pass_by("evaluate"))


def patch_run_trial(module: Any, here: Here) -> None:
    before(module, "job_of", lambda worker, order: here.pass_by("start", worker.rank, order.directory.name))


def writes(here: Here, prefix: str, place: str | None = None) -> Callable[..., Any]:
    """For what writes files. Places within, each with `prefix`: before a file is flushed, before it gets its name, before
    the whole gets its own."""

    def wrapper(original: Any, *args: Any, **options: Any) -> Any:
        here.pass_by(place) if place else None
        here.writing = prefix
        try:
            return original(*args, **options)
        finally:
            here.writing = None

    return wrapper


def patch_phases(module: Any, here: Here) -> None:
    around(module.PhaseStore, "put", writes(here, "put_", "put"))


def patch_checkpoint(module: Any, here: Here) -> None:
    around(module, "save", writes(here, "", "save"))
    for call in ("fsync", "replace", "rename"):
        before(os, call, lambda *_, call=call: here.pass_by(here.writing + call) if here.writing is not None else None)


def patch_metrics(module: Any, here: Here) -> None:
    """A row goes to the disk in one call."""

    def write(original: Any, file: int, data: bytes) -> int:
        fault = here.at("row") if here.writing == "row_" else None
        if fault and fault.action == "short":
            return original(file, data[: len(data) // 2])
        strike(fault)
        return original(file, data)

    around(module.Rows, "add", writes(here, "row_"))
    around(os, "write", write)


def patch_workers(module: Any, here: Here) -> None:
    def all_reduce(original: Any, worker: Any, tensor: Any) -> Any:
        """The victim has begun the exchange and the others wait in it."""
        fault = here.at("all_reduce")
        if fault and worker.size > 1:
            from torch import distributed

            distributed.all_reduce(tensor.detach().clone(), async_op=True)
        strike(fault)
        return original(worker, tensor)

    around(module.ProcessWorker, "sum_", all_reduce)
    around(module.ProcessWorker, "backward", backward(here))


def backward(here: Here) -> Callable[..., None]:
    """Within the backward pass: the others wait for this rank's gradients."""

    def wrapper(original: Any, worker: Any, value: Any, grad: Any = None) -> None:
        fault = here.at("backward")
        if fault:
            value.register_hook(lambda _: strike(fault))
        original(worker, value, grad)

    return wrapper


def patch_deepspeed(module: Any, here: Here) -> None:
    """It has a backward pass of its own, exchanges weights when it steps, and gathers before a checkpoint."""

    def gather(original: Any, worker: Any, optimizer: bool = False) -> None:
        here.pass_by("gather") if optimizer else None
        original(worker, optimizer)

    around(module.DeepSpeedWorker, "backward", backward(here))
    around(module.DeepSpeedWorker, "gather", gather)
    before(module.DeepSpeedWorker, "apply", lambda *_: here.pass_by("apply"))


def patch_actor(module: Any, here: Here) -> None:
    def meet(place: str, rank: Any) -> None:
        fault = here.at(place, rank.rank)
        if fault:
            time.sleep(0.5)  # for its first sign of life to be out
            strike(fault)

    before(module.Rank, "bind", lambda rank, *_: meet("bind", rank))
    before(module.Rank, "_join", lambda rank, *_: meet("join", rank))
    before(module.Rank, "reset", lambda rank, *_: here.pass_by("reset", rank.rank))


def patch_store(module: Any, here: Here) -> None:
    before(module.Store, "journal", lambda *_: here.pass_by("journal", DRIVER))
    before(module.Store, "commit", lambda store, result: here.pass_by("commit", DRIVER, result["trial"]))
    around(module.Store, "commit", writes(here, "commit_"))


def patch_launch(module: Any, here: Here) -> None:
    before(module.Launcher, "open", lambda *_: here.pass_by("open", DRIVER))
    before(module.Launcher, "close", lambda *_: here.pass_by("close", DRIVER))


PATCHES: dict[str, Callable[[Any, Here], None]] = {
    "orchestrator.trainer": patch_trainer,  # step, evaluate, end
    "orchestrator.run_trial": patch_run_trial,  # start
    "orchestrator.phases": patch_phases,  # put, put_fsync, put_replace, put_rename
    "orchestrator.checkpoint": patch_checkpoint,  # save, fsync, replace, rename
    "orchestrator.metrics": patch_metrics,  # row
    "cluster.engines.base": patch_workers,  # all_reduce, backward
    "cluster.engines.deepspeed": patch_deepspeed,  # backward, apply, gather
    "cluster.actor": patch_actor,  # bind, join, reset
    "orchestrator.store": patch_store,  # journal, commit: of the driver; commit_fsync, commit_replace
    "orchestrator.launch": patch_launch,  # open, close: of the driver
}


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)  # Ray looks at signatures
    def wrapped(*args: Any, **options: Any) -> Any:
        return wrapper(original, *args, **options)

    setattr(owner, name, wrapped)


def before(owner: Any, name: str, first: Callable[..., Any]) -> None:
    def wrapper(original: Any, *args: Any, **options: Any) -> Any:
        first(*args)
        return original(*args, **options)

    around(owner, name, wrapper)


class Patcher(importlib.abc.MetaPathFinder):
    """Lets the usual finders find a module of PATCHES, and patches it once it has run."""

    def __init__(self, here: Here):
        self.here, self.met = here, set[str]()

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in PATCHES or name in self.met:
            return None
        self.met.add(name)
        spec = importlib.util.find_spec(name)
        if spec and spec.loader:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), PATCHES[name](module, self.here))  # type: ignore
        return spec


def arm() -> None:
    """Called by `sitecustomize` in every Python process under `Planted.env`. No reports: they have tests of their own."""
    sys.modules["orchestrator.report"] = report = types.ModuleType("orchestrator.report")
    report.build = lambda study, trials: []  # type: ignore[attr-defined]
    sys.meta_path.insert(0, Patcher(Here(Path(os.environ[VARIABLE]))))
