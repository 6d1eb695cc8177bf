"""Runs a plan on one worker: builds, steps, evaluates, logs, saves, resumes. It has never heard of strategies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from orchestrator import checkpoint, flops, micro_batch, phases
from orchestrator.broadcast import from_rank_0
from orchestrator.checkpoint_interval import CheckpointInterval, expected_cost
from orchestrator.compiled import check_graphs, compile_
from orchestrator.evaluate import average_buffers, evaluate, reduced
from orchestrator.feature_cache import features
from orchestrator.files import write_json
from orchestrator.identity import names
from orchestrator.metrics import Rows
from orchestrator.micro_batch import MicroBatches
from orchestrator.phases import PhaseStore, Record
from orchestrator.recipe.choices import LARGEST
from orchestrator.recipe.schema import Speed
from orchestrator.recipe.workload_schema import Interval, Target
from orchestrator.results import Deadline, reached, unmet
from orchestrator.stopwatch import Stopwatch
from orchestrator.tuning import tune
from orchestrator.workloads.order import micro, share
from strategies.contract import Batch, Clock, Plan, State, Stream, Weights, Worker, mix
from strategies.net import Net

SAVED = 3  # times the weights, about: a checkpoint holds them, the optimizer's state and what came before
SAVE = "a checkpoint is due"  # goes with the metrics of a row, so that all ranks know what rank 0 decided
EXPLODED = 3.0  # times the first loss: a trial that stays above it for 1 % of its steps has diverged


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that one training run needs, beside the worker."""

    plan: Plan
    dataset: Any  # workloads.Dataset, or what has its interface
    seed: int
    directory: Path  # of the trial: metrics.jsonl, checkpoints/
    store: PhaseStore
    context: dict[str, Any]  # what determines the result beside the plan
    evaluate: Interval = Interval(epochs=1)
    target: Target | None = None
    deadlines: tuple[Deadline, ...] = ()  # a trial that misses one is given up, its phase not kept
    micro_batch: int | None = None  # examples per forward pass at most; None: found
    dtype: torch.dtype = torch.float32
    log_steps: int = 50
    speed: Speed = Speed(patch_convolutions=False)
    save_seconds: float | None = None  # of training between checkpoints; None: as often as pays off
    mtbf: float = 3600.0  # seconds from one failure to the next
    keep: int = 2


@dataclass(slots=True)
class Progress:
    """How far a trial has come; JSON through and through, saved with each checkpoint."""

    phase: int = 0
    step: int = 0  # in the phase
    steps: int = 0  # over all phases
    examples: int = 0
    epochs: float = 0.0
    flops: float = 0.0  # of training, see `orchestrator.flops`
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    save_seconds: float = 0.0
    saves: int = 0
    first_loss: float | None = None
    exploded_since: int | None = None  # step since which the loss has been too high
    status: str = "running"  # done, diverged, pruned
    reused_steps: int = 0
    reused_phases: int = 0
    micro_batch: int = 0  # of the last phase, where it was trained
    parameters: int = 0  # likewise
    patch_convolutions: int = 0  # likewise: how many convolutions go by patches


class Trainer:
    """Takes a trial through the phases of its plan."""

    def __init__(self, job: Job, worker: Worker):
        self.job, self.worker = job, worker
        worker.take_roles(job.plan.roles)
        self.progress = Progress()
        self.rows = Rows(job.directory / "metrics.jsonl", writes=worker.rank == 0)

    def run(self) -> Progress:
        """Trains what is left of the plan, from the newest checkpoint whose rows are all there, if there is one."""
        folder = self.job.directory / "checkpoints"
        found = from_rank_0(self.worker, lambda: checkpoint.load(folder, self.rows.last_step()))
        if found:
            self.progress = Progress(**found["progress"])
        self.rows.trim(self.progress.steps)
        if self.worker.rank == 0:  # for the collection of what nobody uses
            write_json(self.job.directory / "phases.json", names(self.job.plan, self.job.context))
        carried = Carried(found["carried"]) if found else Carried()
        for index in range(self.progress.phase, len(self.job.plan.phases)):
            carried = self._phase(index, carried, found)
            found = None
            if self.progress.status != "running":
                return self.progress
        self.progress.status = "done"
        return self.progress

    def _phase(self, index: int, carried: Carried, found: dict[str, Any] | None) -> Carried:
        name = phases.key(self.job.plan, index, self.job.context)
        kept = from_rank_0(self.worker, lambda: self._kept(name))
        if kept:
            return self._reuse(Record(**kept))
        if not found:
            self.progress.phase, self.progress.step = index, 0
            if index and not self.job.plan.phases[index - 1].hands_on:  # another network may start at another loss
                self.progress.first_loss = self.progress.exploded_since = None
        run = PhaseRun(self.job, self.worker, self.progress, self.rows, carried)
        if found:
            checkpoint.restore(run.state, found["state"])
        self.progress.micro_batch, self.progress.parameters = run.micro, sum(p.numel() for p in run.net.parameters())
        run.train()
        if self.worker.rank == 0 and self.progress.status in ("running", "done"):
            record = Record(run.weights(), self.rows.of_phase(index), asdict(self.progress), run.handed_on)
            self.job.store.put(name, record)
        return Carried(run.weights(), run.handed_on)

    def _kept(self, name: str) -> dict[str, Any] | None:
        record = self.job.store.get(name)
        return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)} if record else None

    def _reuse(self, record: Record) -> Carried:
        self.rows.trim(record.progress["steps"] - record.progress["step"])  # rows of an unfinished attempt at the phase
        self.rows.extend(record.rows)
        reused = self.progress.reused_steps + record.progress["step"]
        told = {"reused_steps": reused, "reused_phases": self.progress.reused_phases + 1}
        self.progress = Progress(**record.progress | told)
        return Carried(record.weights, record.state)


@dataclass(frozen=True, slots=True)
class Carried:
    """What a phase takes over from the one before."""

    weights: Weights | None = None
    state: Any = None  # decoded


class PhaseRun:
    """One phase on one worker: network, learner state, and the loop."""

    def __init__(self, job: Job, worker: Worker, progress: Progress, rows: Rows, carried: Carried):
        self.job, self.worker, self.progress, self.rows, self.carried = job, worker, progress, rows, carried
        self.phase = phase = job.plan.phases[progress.phase]
        self.steps = phase.steps(job.dataset.examples)
        self.every = job.evaluate.in_steps(job.dataset.examples, phase.batch)
        self.net = self._build()
        self.data = self._data()
        self.flops = flops.per_example(self.net, self._train_batch(0, self.net.sample), worker)
        self._quicken()
        self.micro = self._micro_batch()
        self.size = sum(t.nbytes for t in self.weights().values())  # in bytes, while no engine has taken them apart
        self.state: State = phase.learner.init(self.net, worker)
        if carried.state is not None:
            checkpoint.restore(self.state, self._adopted(carried.state))
        self.deadlines = self._deadlines()
        self.handed_on: Any = None
        self.window: dict[str, torch.Tensor] = {}  # sums of this rank's metrics since the last row
        self.window_start = progress.step
        self.watch = Stopwatch(worker.device)
        self.interval = CheckpointInterval(job.save_seconds, job.mtbf)
        self.saved_at = progress.train_seconds
        self.save_agreed = False  # whether a checkpoint is due, alike on all ranks

    def _build(self) -> Net:
        job = self.job
        seed(self.worker.device, mix(job.seed, "init", self.progress.phase))
        net = self.phase.model(job.dataset.inputs, job.dataset.classes)
        for surgery in self.phase.surgery:
            net = surgery(net)
        net = net.to(device=self.worker.device, dtype=job.dtype)
        if job.speed.channels_last and len(job.dataset.inputs) == 3:
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.carried.weights is not None:
            self.phase.carry(self.carried.weights, net)
        else:
            self._initialise(net)
        return net

    def _data(self) -> Any:
        """The data set, or what frozen stages make of it; making that is part of training."""
        if not self.phase.cache:
            return self.job.dataset
        watch = Stopwatch(self.worker.device)
        data = features(self.job, self.progress.phase, self.net, self.worker)
        self.progress.train_seconds += watch.lap()
        return data

    def _initialise(self, net: Net) -> None:
        """A pure function of the data: made again after a resume, when the checkpoint's weights take its place."""
        for initialise in self.phase.initialise:
            initialise(net, lambda n: self.phase.source(self.job.dataset.first(n), net))

    def _adopted(self, state: Any) -> Any:
        """What the phase before handed on, fit for this one's learner."""
        fit = getattr(self.phase.carry, "state", None)
        return fit(state, self.state) if fit else state

    def _quicken(self) -> None:
        """The same network, computed faster (see `Speed`)."""
        speed, progress = self.job.speed, self.progress
        local = min(-(-self.phase.batch // self.worker.replicas), self.job.micro_batch or LARGEST)
        sample = partial(self._train_batch, 0)
        progress.patch_convolutions = tune(self.net, sample, local, self.worker, speed.patch_convolutions)
        compile_(self.net, speed.compile)

    def _micro_batch(self) -> int:
        local = -(-self.phase.batch // self.worker.replicas)
        found = min(local, self.job.micro_batch or local)
        if not self.job.micro_batch:
            found = micro_batch.largest(self.net, partial(self._train_batch, 0), local, self.worker)
        if self.job.speed.compile == "cuda_graphs":
            check_graphs(self.phase.learner, local, found, self.worker)
        return found

    def _train_batch(self, start: int, stop: int) -> Batch:
        return self.phase.source(self.data.train(start, stop), self.net)

    def weights(self) -> dict[str, torch.Tensor]:
        return self.net.state_dict()

    # ------------------------------------------------------------------------------------------------------- steps

    def train(self) -> None:
        self.watch.lap()
        while self.progress.step < self.steps and self.progress.status == "running":
            self.advance()
        self.worker.gather(optimizer=self.phase.hands_on)
        if self.phase.hands_on:
            self._ask("gather", self.state)
            self.handed_on = checkpoint.snapshot(self.state)
        self.phase.learner.finish(self.state)

    def advance(self) -> None:
        """One step, and what is due after it: a row, an evaluation, a checkpoint."""
        self._step()
        if self._due():
            self._log()

    def _step(self) -> None:
        clock = self._clock()
        seed(self.worker.device, mix(clock.seed, "step", clock.phase, clock.step, clock.rank))
        metrics = self.phase.learner.step(self.state, self._batches(clock), clock)
        for name, value in metrics.items():
            self.window[name] = self.window[name] + value if name in self.window else value
        progress = self.progress
        progress.step += 1
        progress.steps += 1
        progress.examples += self.phase.batch
        progress.flops += self.phase.batch * self.flops
        progress.epochs = progress.examples / self.job.dataset.examples
        if self._ask("ended", self.state):
            self.steps = progress.step

    def _ask(self, name: str, *args: Any) -> Any:
        """What a method answers that a learner may have, or None."""
        method = getattr(self.phase.learner, name, None)
        return method(*args) if method else None

    def _clock(self) -> Clock:
        progress, batch = self.progress, self.phase.batch
        per_step = batch / self.job.dataset.examples
        epoch = progress.step * per_step
        return Clock(progress.step, self.steps, epoch, per_step, batch, self.job.seed, progress.phase, self.worker.rank)

    def _batches(self, clock: Clock) -> Sequence[Batch]:
        """This rank's micro-batches of the step. Positions count on through all phases: none sees another's order."""
        first = self.progress.examples
        begin, end = share(first, first + self.phase.batch, self.worker.replica, self.worker.replicas)
        return MicroBatches(micro(begin, end, self.micro), partial(self._mapped, clock))

    def _mapped(self, clock: Clock, start: int, stop: int) -> Batch:
        batch = self._train_batch(start, stop)
        stream = Stream(lambda n: self._train_batch(start + n, stop + n), self.job.dataset.classes)
        for change in self.phase.maps:
            batch = change(batch, clock, stream)
        return batch

    # ------------------------------------------------------------------------------------------ log, evaluate, save

    def _due(self) -> bool:
        step = self.progress.step
        return step in (1, self.steps) or step % self.job.log_steps == 0 or self._evaluates()

    def _evaluates(self) -> bool:
        return self.progress.step % self.every == 0 or self.progress.step == self.steps

    def _log(self) -> None:
        """One row of metrics. All ranks reduce first, then decide alike from what they share."""
        seconds = self.watch.lap()
        self.progress.train_seconds += seconds
        row = self._row(seconds)
        average_buffers(self.net, self.worker)
        self.worker.settle()
        self._ask("settle", self.state)
        self._judge_loss(row["train_loss"])
        if self._evaluates() and self.progress.status == "running":
            self.worker.gather()
            self._ask("refresh", self.state, lambda n: self._train_batch(0, min(n, self.job.dataset.examples)))
            row |= evaluate(self.phase, self.net, self.state, self.data, self.worker)
        if self.job.target and self.job.target.stop and reached(self.job.target, row):
            self.progress.status = "done"
        self._judge_deadlines(row)
        self.rows.add(row)
        self.progress.eval_seconds += self.watch.lap()
        if self.save_agreed and self.progress.status == "running" and self.progress.step < self.steps:
            self._save()
        self.watch.lap()

    def _row(self, seconds: float) -> dict[str, Any]:
        progress, steps = self.progress, self.progress.step - self.window_start
        means = reduced(self.window | {SAVE: self._save_wanted()}, self.worker, steps)
        self.save_agreed = means.pop(SAVE) > 0
        self.window, self.window_start = {}, progress.step
        rate = getattr(self.phase.learner, "rate", None)
        row: dict[str, Any] = {"step": progress.steps, "phase": progress.phase, "epoch": progress.epochs}
        row |= {"examples": progress.examples, "flops": progress.flops, "seconds": progress.train_seconds}
        told = {"rate": means.pop("rate")} if "rate" in means else {}
        row |= told or ({"rate": rate(self._last_clock())} if rate else {})
        row |= {f"train_{name}": value for name, value in means.items()}
        return row | {"examples_per_second": steps * self.phase.batch / seconds}

    def _last_clock(self) -> Clock:
        """The clock of the step that was just taken."""
        clock = self._clock()
        return dataclasses.replace(clock, step=clock.step - 1, epoch=clock.epoch - clock.epochs_per_step)

    def _judge_loss(self, loss: float) -> None:
        """Diverged: not finite, or above EXPLODED times the first loss for 1 % of the phase."""
        progress = self.progress
        progress.first_loss = loss if progress.first_loss is None else progress.first_loss
        high = loss > EXPLODED * progress.first_loss
        progress.exploded_since = (progress.exploded_since or progress.steps) if high else None
        lasting = high and progress.steps - progress.exploded_since >= 0.01 * self.steps  # type: ignore[operator]
        if not math.isfinite(loss) or lasting:
            progress.status = "diverged"

    def _deadlines(self) -> list[Deadline]:
        """Those that no row so far has met; rank 0 alone has the rows."""
        all_of_them = self.job.deadlines
        if not all_of_them:
            return []
        left = from_rank_0(self.worker, lambda: [all_of_them.index(d) for d in unmet(all_of_them, self.rows.read())])
        return [all_of_them[i] for i in left]

    def _judge_deadlines(self, row: dict[str, Any]) -> None:
        """A phase at its end is not given up: it is there to be kept."""
        self.deadlines = unmet(self.deadlines, [row])
        missed = any(deadline.step <= row["step"] for deadline in self.deadlines)
        if missed and self.progress.status == "running" and self.progress.step < self.steps:
            self.progress.status = "pruned"

    def _save(self) -> None:
        """All ranks make whole what is spread, rank 0 writes; no step sees a difference."""
        self.worker.gather(optimizer=True)
        self._ask("gather", self.state)
        if self.worker.rank == 0:
            content = {"progress": asdict(self.progress), "state": self.state, "carried": self.carried.weights}
            self.rows.sync()
            checkpoint.save(self.job.directory / "checkpoints", self.progress.steps, content, self.job.keep)
        self.saved_at = self.progress.train_seconds
        self.progress.save_seconds += self.watch.lap()
        self.progress.saves += 1

    def _save_wanted(self) -> torch.Tensor:
        """This rank's share of the decision, which is rank 0's: clocks differ."""
        return torch.tensor(float(self.worker.rank == 0 and self._save_due()), device=self.worker.device)

    def _save_due(self) -> bool:
        progress, trained = self.progress, self.progress.train_seconds
        cost = progress.save_seconds / progress.saves if progress.saves else expected_cost(SAVED * self.size)
        return self.interval.due(trained - self.saved_at, trained, progress.save_seconds, cost)


def seed(device: torch.device, number: int) -> None:
    """Seeds the generators in use. `torch.manual_seed` would queue a call with its stack for each kind of device not in use."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
