"""What books add to a training step, for `benchmarks.overhead`: rows, checkpoints, the W&B mirror, the gradient noise probe.

Recipes that differ in their books alone take turns of less than a second on the same two workers: what drifts, drifts
for all.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks import common
from orchestrator import wandb_mirror
from orchestrator.allocator import keep_freed_memory
from orchestrator.driver import config
from orchestrator.files import write_json
from orchestrator.metrics import Rows
from orchestrator.recipe import expand
from orchestrator.recipe.load import loads
from orchestrator.recipe.schema import Wandb
from orchestrator.run_trial import Assignment, job_of
from orchestrator.trainer import Carried, PhaseRun, Progress

NEVER = 10**9
TURNS = {"digits": 50, "cifar10": 5}  # data -> steps of a turn: some 15 and 150 ms each
LOG_STEPS = 50
WARMUP = 6  # rounds; in them W&B begins its runs
TIMEOUT = 3600.0  # seconds for all rounds

NONE, MIRRORED, ALL = "none", "rows, and the W&B mirror, offline", "all of them"
ROWS: dict[str, Any] = {"log_steps": LOG_STEPS}
SAVES: dict[str, Any] = {"checkpoint": {"seconds": "auto"}}
PROBE: dict[str, Any] = {"strategies": ["noise_scale"]}
BOOKS: dict[str, dict[str, Any]] = {
    NONE: {},
    "rows, every 50 steps": ROWS,
    "rows, and checkpoints as often as by default": ROWS | SAVES,
    MIRRORED: ROWS,
    "gradient noise probe": PROBE,
    ALL: ROWS | SAVES | PROBE,
}


def recipe(data: str, steps: int, books: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "study": "books",
        "workload": {"data": data, "model": {"small_cnn": {"width": 32}}, "evaluate": {"steps": steps}},
        "engine": "ddp",
        "cluster": {"workers": 2, "threads": 1},
        "precision": "fp32",
        "base": {"batch": 256, "steps": steps, "rate": {"peak": 0.1}, "optimizer": {"sgd": {"momentum": 0.9}}},
        "log_steps": NEVER,
        "checkpoint": {"seconds": NEVER},
    } | books


# ------------------------------------------------------------------------------------------------------ on the workers


@dataclass(frozen=True)
class Turns:
    """What the gang is given."""

    assignments: Mapping[str, Assignment]
    mirrors: Mapping[str, int]  # process groups of W&B mirrors, which sleep while others have their turn
    rounds: int
    steps: int  # of a turn


def take_turns(worker: Any, turns: Turns) -> dict[str, Any]:
    """Seconds of each turn, and checkpoints written, by recipe. Who comes first changes from round to round."""
    keep_freed_memory()
    runs = {name: begun(worker, assignment) for name, assignment in turns.assignments.items()}
    names, seconds = list(runs), {name: [] for name in runs}
    for number in range(WARMUP + turns.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            mirrors = turns.mirrors if worker.rank == 0 and number >= WARMUP else {}
            wake(mirrors, name)
            seconds[name].append(turn(worker, runs[name], turns.steps))
    saves = {name: run.progress.saves for name, run in runs.items()}
    return {"seconds": {name: found[WARMUP:] for name, found in seconds.items()}, "saves": saves}


def begun(worker: Any, assignment: Assignment) -> PhaseRun:
    job = job_of(worker, assignment)
    rows = Rows(job.directory / "metrics.jsonl", writes=worker.rank == 0)
    rows.trim(0)
    return PhaseRun(job, worker, Progress(), rows, Carried())


def turn(worker: Any, run: PhaseRun, steps: int) -> float:
    together(worker)
    start = time.perf_counter()
    run.watch.lap()  # what others did meanwhile was no training of this one
    for _ in range(steps):
        run.advance()
    run.progress.train_seconds += run.watch.lap()
    together(worker)
    return time.perf_counter() - start


def together(worker: Any) -> None:
    worker.sum_(torch.zeros(1))


def wake(mirrors: Mapping[str, int], name: str) -> None:
    """This one, and let the others sleep."""
    for other, group in mirrors.items():
        os.killpg(group, signal.SIGCONT if other == name else signal.SIGSTOP)


# ------------------------------------------------------------------------------------------------------- in the driver


def measure(data: str, rounds: int) -> dict[str, Any]:
    """`take_turns` on a gang, and the seconds of processor time of W&B's processes meanwhile, by recipe."""
    from cluster.gang import RayGang
    from cluster.session import connect, disconnect
    from cluster.tasks import Done, Task

    common.require("ray", "wandb")
    root = Path(tempfile.mkdtemp())
    assignments = {name: assigned(root / str(number), data, rounds, name) for number, name in enumerate(BOOKS)}
    with mirrored({name: assignments[name].directory.parent.parent for name in (MIRRORED, ALL)}) as mirrors:
        connect(cpus=2)
        try:
            gang = RayGang(2)
            groups = {name: mirror.process.pid for name, mirror in mirrors.items()}
            gang.start(Task(take_turns, Turns(assignments, groups, rounds, TURNS[data]), engine="ddp"))
            outcome = gang.poll(TIMEOUT)
        finally:
            disconnect()
        if not isinstance(outcome, Done):
            raise SystemExit(f"the workers did not come to their end: {outcome}")
        return outcome.value | {"wandb_seconds": {name: processor_seconds(pid) for name, pid in groups.items()}}


def assigned(study: Path, data: str, rounds: int, name: str) -> Assignment:
    """The recipe's only trial, in a directory as the mirror expects it."""
    text = json.dumps(recipe(data, (WARMUP + rounds) * TURNS[data] + 1, BOOKS[name]))
    (trial,) = expand(loads(text, "books.yaml"), data, "fp32")
    folder = study / "trials" / trial.id
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config(trial))
    return Assignment(trial, folder, study / "phases")


@contextmanager
def mirrored(studies: Mapping[str, Path]) -> Iterator[dict[str, wandb_mirror.Mirror]]:
    started = {name: wandb_mirror.start(study, Wandb(mode="offline")) for name, study in studies.items()}
    mirrors = {name: mirror for name, mirror in started.items() if mirror}
    if len(mirrors) < len(studies):
        raise common.Skipped("W&B is turned off in the environment: unset WANDB_MODE and BIGBATCH_NO_TRACKING")
    try:
        yield mirrors
    finally:
        for mirror in mirrors.values():
            os.killpg(mirror.process.pid, signal.SIGCONT)
            mirror.stop()


def processor_seconds(pid: int) -> float:
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


# ----------------------------------------------------------------------------------------------------------- the table


def table(data: str, rounds: int) -> dict[str, Any]:
    found, steps = measure(data, rounds), TURNS[data]
    off, saves = found["seconds"][NONE], found["saves"]
    rows = [
        (name, f"{1000 * statistics.median(seconds) / steps:.3g}", added(seconds, off), str(saves[name]))
        for name, seconds in found["seconds"].items()
    ]
    title = f"A small CNN on {data}, batch 256, 2 workers, {rounds} turns of {steps} steps each"
    common.tell(title, ("book", "ms per step, median", "added, per cent, mean", "checkpoints"), rows, {})
    for name, seconds in found["wandb_seconds"].items():
        print(
            f"W&B's processes, {name}: {seconds:.3g} s of a core, start included, beside {sum(found['seconds'][name]):.3g} s"
        )
    return found


def added(seconds: Sequence[float], off: Sequence[float]) -> str:
    """Per cent over all turns together, with the 95 % interval of 10,000 bootstraps of rounds."""
    both = np.array([seconds, off])
    rounds = np.random.default_rng(0).integers(both.shape[1], size=(10_000, both.shape[1]))
    mine, others = both[:, rounds].sum(axis=2)
    low, high = np.percentile(100 * (mine / others - 1), [2.5, 97.5])
    return f"{100 * (sum(seconds) / sum(off) - 1):+.2f} [{low:+.2f}, {high:+.2f}]"
