"""Runs a study: hands trials to gangs, sees each through its life, keeps journal and status, and ends with the report."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.controller import Action, Life, State, advance
from cluster.policies import FailurePolicy
from cluster.tasks import ClusterError, Done, Failed, Gang, Lost, Outcome, Task
from cluster.torchrun import blame
from orchestrator import wandb_mirror
from orchestrator.environment import redact
from orchestrator.files import Tail, write_json
from orchestrator.launch import Launcher
from orchestrator.plan import check_plans
from orchestrator.progress import Progress
from orchestrator.recipe.resolve import size
from orchestrator.run_trial import Assignment, failure, run_trial
from orchestrator.shipment import shipment
from orchestrator.signals import TERMINATED, Signals, Stopped
from orchestrator.study import Study
from orchestrator.terminal import say
from orchestrator.trial import Trial

OK, USAGE, SOME_FAILED = 0, 2, 3  # exit codes; those of signals are in signals.py
TICK = 0.5  # seconds between two looks at the running trials


def drive(study: Study, wait: bool = False, fresh: bool = False, fail_fast: bool = False) -> int:
    """Run what is left of a study; the exit code. Raises Busy, Changed, DataError, PlanError before anything is written."""
    check_plans(study.recipe)
    study.check_data()
    if fresh:
        with study.store.lock(wait):
            study.set_aside()
    with study.store.lock(wait):
        study.check_unchanged()
        study.write_recipe()
        study.adopt()
        return Driver(study, fail_fast).run()


class Ticker(threading.Thread):
    """A context in which `tick` is called now and then, by a thread: for a poll that trains in this very process.

    Raises at its end what kept the thread from going on: a disk that is full.
    """

    def __init__(self, tick: Callable[[], None]):
        super().__init__(daemon=True)
        self.tick, self.over = tick, threading.Event()
        self.error: OSError | None = None

    def run(self) -> None:
        try:
            while not self.over.wait(TICK):
                self.tick()
        except OSError as error:
            self.error = error

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *raised: object) -> None:
        self.over.set()
        self.join()
        if self.error and not any(raised):
            raise self.error


@dataclass(slots=True)
class Run:
    """A trial on its way."""

    trial: Trial
    life: Life = field(default_factory=Life)
    attempts: int = 0
    rows: Tail | None = None
    latest: dict[str, Any] = field(default_factory=dict)  # the newest value of each column


class Driver:
    def __init__(self, study: Study, fail_fast: bool = False):
        self.study, self.store, self.fail_fast = study, study.store, fail_fast
        self.waiting = deque(Run(trial) for trial in study.left())
        self.busy: dict[str, tuple[Gang, Run]] = {}
        self.idle: list[Gang] = []
        self.policy = FailurePolicy(study.recipe.cluster.max_failures)
        self.launcher = Launcher(study.recipe.cluster, study.runs.resolve())
        self.counts = self._count()
        self.started = time.time()
        self.mirror: wandb_mirror.Mirror | None = None
        self.state = "running"
        self.exit_code: int | None = None
        self.began: dict[str, float] = {}  # gang -> when its last trial ended, on the worker's clock
        self.gaps: list[float] = []
        self.startup: float | None = None
        self.wall: list[float] = []  # seconds of each trial that ended in this run
        self.ticked = 0.0

    def run(self) -> int:
        if not self.waiting:
            return self._nothing_to_do()
        try:
            code = self._trials()
        finally:
            self.launcher.close([gang for gang, _ in self.busy.values()] + self.idle)
        self._end(code)
        self._report()
        if self.mirror:
            self.mirror.stop()
        return code

    def _trials(self) -> int:
        with Progress() as self.view, Signals(at_once=self.launcher.in_process) as signals:
            code = self._loop(signals)
            self._conclude(code)
            with contextlib.suppress(Stopped):  # by a second signal
                self.view.update(self.status())
        return code

    def _begin(self) -> None:
        self.store.journal("study_started", pid=os.getpid(), left=len(self.waiting))
        if tracking := self.study.recipe.tracking.wandb:
            self.mirror = wandb_mirror.start(self.store.directory, tracking)

    def _loop(self, signals: Signals) -> int:
        try:
            self._begin()
            self.idle = self.launcher.open(len(self.waiting))
            signals.arm()
            while signals.code is None and (self.busy or (self.waiting and self.idle)):
                self._dispatch()
                self._hand_over()
                self._tick()
                self._poll()
        except ClusterError as error:
            say(f"bigbatch: {error}")
            return USAGE
        except Stopped:
            pass
        except SystemExit:  # Ray's own SIGTERM handler, which stands until `arm`
            signals.code = signals.code or TERMINATED
        if self.waiting and signals.code is None:  # a worker is gone, and only its launcher can start it again
            return TERMINATED
        return signals.code or (SOME_FAILED if self.counts["failed"] else OK)

    # ------------------------------------------------------------------------------------------------ trials and gangs

    def _dispatch(self) -> None:
        while self.idle and self.waiting:
            self._start(self.idle.pop(), self.waiting.popleft())

    def _hand_over(self) -> None:
        """A gang that finds no room gives its trial to one that has room and nothing to do, whose room it may wait for."""
        waits = [(gang, run) for gang, run in self.busy.values() if self.idle and gang.waits]
        ready = [gang for gang in self.idle if waits and not gang.waits]
        for (late, run), gang in zip(waits, ready, strict=False):
            say(f"{run.trial.id}: {late.name} has found no room; {gang.name} takes it over")
            del self.busy[late.name]
            self.idle.remove(gang)
            late.close()
            self._give(gang, run)

    def _start(self, gang: Gang, run: Run) -> None:
        run.life, _ = advance(run.life, None, self.policy)
        run.attempts += 1
        run.rows = Tail(self.store.trial(run.trial.id) / "metrics.jsonl")
        self._give(gang, run)

    def _give(self, gang: Gang, run: Run) -> None:
        self.busy[gang.name] = (gang, run)
        if run.attempts == 1:
            folder = self.store.trial(run.trial.id)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", redact(config(run.trial)))
        gang.start(self._task(run.trial))
        self.store.journal("trial_started", trial=run.trial.id, attempt=run.attempts, gang=gang.name)

    def _task(self, trial: Trial) -> Task:
        directory, phases = self.store.trial(trial.id).resolve(), self.study.phases.resolve()
        files = shipment(trial, directory, phases)
        data, deadlines = files.constant[0] if files.constant else None, self.study.deadlines(trial)
        assignment = Assignment(trial, directory, phases, data, deadlines)
        engine, cluster = trial.engine, trial.cluster
        return Task(
            run_trial, assignment, engine.name, engine.options.model_dump(), trial.precision, cluster.threads, files
        )  # fmt: skip

    def _poll(self) -> None:
        patience = TICK / max(1, len(self.busy))
        for name, (gang, run) in list(self.busy.items()):
            with Ticker(self._tick) if self.launcher.in_process else contextlib.nullcontext():
                outcome = gang.poll(patience)
            if outcome is not None:
                del self.busy[name]
                self._settle(gang, run, outcome)

    def _settle(self, gang: Gang, run: Run, outcome: Outcome) -> None:
        run.life, action = advance(run.life, outcome, self.policy)
        if isinstance(outcome, Done):
            self.idle.append(gang)
            if not self.study.searched:  # whose next trial waits for what this one tells of its rivals
                self._dispatch()  # first the next trial, then the books
            return self._done(gang, run, outcome.value)
        self._lost(run, outcome)
        if action is Action.RESUME:
            self.waiting.appendleft(run)
        else:
            self._failed(run, outcome)
        self.began.pop(gang.name, None)  # what follows on a new gang tells nothing about gaps
        if self.waiting:
            anew = self.launcher.replace(gang)
            self.idle += [anew] if anew else []
        else:
            gang.close()

    def _done(self, gang: Gang, run: Run, result: dict[str, Any]) -> None:
        began, ended = result.pop("began"), result.pop("ended")
        if gang.name in self.began:
            self.gaps.append(began - self.began[gang.name])
        self.began[gang.name] = ended
        self.startup = self.startup if self.startup is not None else began - self.started
        self.wall.append(ended - began)
        self._commit(run, result | {"attempts": run.attempts})

    def _commit(self, run: Run, result: dict[str, Any]) -> None:
        called_for = self.study.commit(run.trial, result)
        self.store.journal("trial_ended", trial=run.trial.id, status=result["status"], phases=result.get("phases"))
        self.counts[result["status"]] += 1
        for trial in called_for:
            self._take(trial)
        self.view.ended(result, self.status())

    def _take(self, trial: Trial) -> None:
        """A trial that a search has come to call for; it may be on file from an earlier form of the recipe."""
        if self.study.done(trial):
            self.counts[self.store.result(trial.id)["status"]] += 1  # type: ignore[index]
        elif not (self.fail_fast and self.counts["failed"]):
            self.waiting.append(Run(trial))

    def _lost(self, run: Run, outcome: Failed | Lost) -> None:
        reason = outcome.reason if isinstance(outcome, Lost) else f"{outcome.kind}: {outcome.message}"
        self.store.journal("worker_lost", trial=run.trial.id, rank=outcome.rank, reason=reason, attempt=run.attempts)
        if run.life.state is State.RESUMING:
            say(f"{run.trial.id}: rank {outcome.rank} was lost ({reason}); a new gang goes on")

    def _failed(self, run: Run, outcome: Failed | Lost) -> None:
        folder, cause = self.store.trial(run.trial.id), one_line(outcome, run.life.hint)
        write_json(folder / "error.json", redact(asdict(outcome) | {"hint": run.life.hint}))
        log = folder / "logs" / f"rank_{outcome.rank}.log"
        blame(f"trial {run.trial.id}: {cause}; log: {log}")
        self._commit(run, failure(run.trial, cause))
        print(f"  trial {run.trial.id}; log: {log}", file=sys.stderr)
        if self.fail_fast:
            self.waiting.clear()

    # ----------------------------------------------------------------------------------------------- status and end

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self.ticked < TICK:
            return
        self.ticked = now
        status = self.status()
        self.store.write_status(status)
        self.view.update(status)

    def status(self) -> dict[str, Any]:
        total = size(self.study.recipe)
        left = (
            total - len(self.busy) - sum(self.counts.values())
        )  # also what --fail-fast gave up, or a search has yet to call for
        trials = {"total": total, "running": len(self.busy), "left": left, **self.counts}
        return {
            "study": self.study.recipe.study,
            "state": self.state,
            "exit_code": self.exit_code,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": self.started,
            "updated": time.time(),
            "trials": trials,
            "eta_seconds": self._eta(),
            "gap_seconds": statistics.median(self.gaps) if self.gaps else None,
            "startup_seconds": self.startup,
            "running": [self._running(run) for _, run in self.busy.values()],
        }

    def _running(self, run: Run) -> dict[str, Any]:
        for row in run.rows.new() if run.rows else ():
            run.latest |= row
        trial, latest = run.trial, run.latest
        told = ("step", "epoch", "train_loss", "test_accuracy", "examples_per_second")
        names = {"trial": trial.id, "arm": trial.arm, "batch": trial.base.batch, "seed": trial.seed}
        return names | {"epochs": trial.base.epochs, "steps": trial.base.steps} | {k: latest.get(k) for k in told}

    def _eta(self) -> float | None:
        if not self.wall:
            return None
        open_trials = len(self.waiting) + 0.5 * len(self.busy)
        return statistics.fmean(self.wall) * open_trials / max(1, len(self.busy) + len(self.idle))

    def _count(self) -> dict[str, int]:
        counts = {"done": 0, "failed": 0, "diverged": 0, "pruned": 0}
        waiting = {run.trial.id for run in self.waiting}
        for result in self.study.finished():
            counts[result["status"]] += result["trial"] not in waiting
        return counts

    def _conclude(self, code: int) -> None:
        self.exit_code = code
        self.state = {OK: "done", SOME_FAILED: "failed", USAGE: "failed"}.get(code, "interrupted")
        for gang, run in self.busy.values():
            self.waiting.appendleft(run)
            self.idle.append(gang)
        self.busy.clear()

    def _end(self, code: int) -> None:
        self.store.journal("study_ended", state=self.state, exit_code=code)
        self.store.write_status(self.status())
        if self.state == "interrupted":
            print(
                f"interrupted with {self.status()['trials']['left']} trials left; the same command goes on",
                file=sys.stderr,
            )
        for line in self.study.stages.unfinished() if self.state == "failed" else ():
            print(line, file=sys.stderr)
        if self.gaps:
            print(
                f"first trial after {self.startup:.1f} s; median gap between trials {statistics.median(self.gaps):.3f} s",
                file=sys.stderr,
            )

    def _report(self) -> None:
        from orchestrator.report import build

        if not self.study.finished():
            return
        headlines = build(self.store.directory, [trial.id for trial in self.study.trials])
        self.store.write_status(self.status() | {"headlines": headlines})
        self._tell(headlines)

    def _tell(self, headlines: list[str]) -> None:
        for line in headlines:
            print(line, file=sys.stderr)
        print(self.store.directory / "report.html")

    def _nothing_to_do(self) -> int:
        """Every trial is done: no worker is started, and a report of these results and this recipe stands."""
        print(f"all {len(self.study.trials)} trials are done", file=sys.stderr)
        report = self.store.directory / "report.html"
        results = [self.store.trial(trial.id) / "result.json" for trial in self.study.trials]
        recipe = [self.store.directory / name for name in ("recipe.yaml", "resolved.yaml")]
        newest = max(path.stat().st_mtime for path in results + recipe)
        headlines = self.store.status().get("headlines")
        if headlines and report.exists() and report.stat().st_mtime >= newest:
            self._tell(headlines)
        else:
            self.state, self.exit_code = "done", OK
            self._report()
        return OK


def config(trial: Trial) -> dict[str, Any]:
    """config.json: the trial as it is specified, stable from run to run."""
    return {"trial": trial.id, **trial.model_dump(mode="json", by_alias=True, exclude_none=True)}


def one_line(outcome: Failed | Lost, hint: str) -> str:
    """The root cause, for the result and the terminal."""
    if isinstance(outcome, Lost):
        text = f"rank {outcome.rank}: {outcome.reason}"
    else:
        text = f"rank {outcome.rank} on {outcome.host}: {outcome.kind}: {outcome.message} ({outcome.where})"
    return f"{text}; {hint}" if hint else text
