"""Gangs of Ray actors that hold one process group.

A gang starts once and runs task after task. All its calls are asynchronous: placing the workers, importing torch in them,
joining the process group and the first task are queued at once, and `poll` meets whatever goes wrong on the way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import psutil

from cluster import couriers, session, stacks
from cluster.actor import Rank, Seat, start_limit
from cluster.couriers import Couriers
from cluster.mirror import make_sign, remove_sign
from cluster.placement import Placement
from cluster.session import capacity, connect, gpus_each, ray
from cluster.tasks import Done, Failed, Lost, Outcome, Task, failure, root_cause

__all__ = ["RayGang", "capacity", "connect", "disconnect", "gpus_each"]

GRACE = 1.0  # seconds for other ranks to report after one has failed
NODE_GRACE = 5.0  # seconds for Ray to notice that a node has gone, after ranks have lost a peer
STOP_LIMIT = 3.0  # seconds for killed processes to be gone

remote: Any = ray.remote  # its type hints leave out concurrency groups


class RayGang:
    """`size` actors on one node or several. See `cluster.tasks.Gang`.

    `gpus`: per worker; by default 1 where the cluster has enough of them.
    `timeout`: seconds after which a rank without a sign of life is lost, and after which a collective fails.
    `placement`: pack: as few nodes as the cluster allows; spread: as many.
    `folder`: of the driver's, in which tasks write; nodes that do not see it get copies of `Task.files`.
    """

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
        self.size, self.name, self.timeout = size, name, timeout
        gpus = gpus_each(size) if gpus is None else gpus
        self.began = time.monotonic()
        self.startup_seconds: float | None = None  # from here to a joined process group
        self.seats: dict[int, Seat] = {}
        self.processes: list[psutil.Process] = []  # of the ranks on this machine
        self.waiting: dict[Any, int] = {}  # calls in flight -> rank
        self.reports: dict[int, Done | Failed] = {}  # of the task, by rank
        self.failed_at: float | None = None
        self.lost: Lost | None = None
        self.broken = self.busy = False
        self.task: Task | None = None
        self.couriers: Couriers | None = None  # once it is known which nodes the ranks are on
        self.placement = Placement(name, size, threads, gpus, placement)
        self.ranks = [self._rank(rank, threads, gpus) for rank in range(size)]
        self.pulse = Pulse([actor.ping.options(concurrency_group="pulse").remote for actor in self.ranks], timeout)
        self.sign = make_sign(folder)
        address = self.ranks[0].bind.remote(timeout)
        joins = [actor.join.remote(address, timeout, self.sign) for actor in self.ranks]
        self.waiting |= {call: rank for rank, call in enumerate(joins)}

    def _rank(self, rank: int, threads: int, gpus: int) -> Any:
        group = self.placement.group
        place = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, rank)
        options = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        where = {"scheduling_strategy": place, "runtime_env": session.of_ranks()}
        actor = remote(concurrency_groups={"pulse": 1}, **where, **options)(Rank)
        return actor.remote(rank, self.size, gpus)

    @property
    def waits(self) -> bool:
        return self.placement.waits

    def start(self, task: Task) -> None:
        if self.broken or self.busy:
            raise RuntimeError(f"{self.name} cannot take a task: it is {'closed or broken' if self.broken else 'busy'}")
        self.busy, self.task, self.reports = True, task, {}
        if self.couriers:
            self._begin(task, self.couriers)

    def _begin(self, task: Task, couriers: Couriers) -> None:
        """All ranks are seated: first their files, then the task."""
        try:
            moved = couriers.send(task.files)
        except ray.exceptions.RayError:
            rank = next(seat.rank for seat in self.seats.values() if not seat.sees_files)
            self.lost = Lost(rank, "a node died while files were sent to it")
            return
        calls = [actor.run.remote(task, moved.get(self.seats[rank].node)) for rank, actor in enumerate(self.ranks)]
        self.waiting |= {call: rank for rank, call in enumerate(calls)}

    def poll(self, timeout: float) -> Outcome | None:
        limit = time.monotonic() + timeout
        while True:
            outcome = self._collect(min(self.pulse.interval, max(0.0, limit - time.monotonic()))) or self._verdict()
            if self.couriers and self.task:
                self.couriers.look()
            if outcome is not None:
                return self._settle(outcome)
            if time.monotonic() >= limit:
                return None

    def _collect(self, timeout: float) -> Lost | None:
        """Take in one report, if one comes. A dead process is told at once: whatever the others say is its effect."""
        if not self.waiting:
            time.sleep(timeout)
            return None
        ready, _ = ray.wait(list(self.waiting), timeout=min(timeout, GRACE / 4) if self.failed_at else timeout)
        for call in ready:
            rank = self.waiting.pop(call)
            try:
                self._note(rank, ray.get(call))
            except ray.exceptions.RayActorError as error:
                return Lost(rank, f"the process of rank {rank}{self._whereabouts(rank)} died", error.preempted)
            except ray.exceptions.RayError as error:
                cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                self._note(rank, failure(rank, self.seats[rank].host if rank in self.seats else "", cause))
        return None

    def _note(self, rank: int, report: Done | Failed) -> None:
        if isinstance(report, Done) and isinstance(report.value, Seat):
            self._seat(report.value)
            if len(self.seats) == self.size:
                self._seated()
            return
        self.reports.setdefault(rank, report)
        if isinstance(report, Failed) and self.failed_at is None:
            self.failed_at = time.monotonic()

    def _seat(self, seat: Seat) -> None:
        self.seats[seat.rank] = seat
        self.processes += processes_here([seat])

    def _seated(self) -> None:
        self.startup_seconds = time.monotonic() - self.began
        self.couriers = Couriers(self.name, list(self.seats.values()))
        remove_sign(self.sign)
        if self.task:
            self._begin(self.task, self.couriers)

    def _verdict(self) -> Outcome | None:
        if self.lost:
            return self.lost
        failures = [report for report in self.reports.values() if isinstance(report, Failed)]
        grace = NODE_GRACE if all(failed.lost_peer for failed in failures) else GRACE
        if failures and (not self.waiting or time.monotonic() - (self.failed_at or 0) > grace):
            return self._failure(root_cause(failures))
        if len(self.reports) == self.size and not failures:
            return self.reports[0]
        silent = self.pulse.silent()
        if silent:
            stacks.ask(self.processes)
        elif self.startup_seconds is None and self.placement.seconds() > start_limit(self.timeout):
            return Lost(0, f"{self.name} has not started: its workers hang")
        return silent

    def _failure(self, cause: Failed) -> Outcome:
        """Before there is a process group, nothing of the task has run: a port taken, a network away, are the cluster's."""
        if self.startup_seconds is None:
            return Lost(cause.rank, f"no process group: {cause.kind}: {cause.message}")
        late = sorted(set(self.waiting.values()) - self.reports.keys())
        if cause.lost_peer and late:  # who fails by a timeout has waited for one who does not get on
            stacks.ask(self.processes)
            return Lost(late[0], f"rank {late[0]} does not get on, rank {cause.rank} waited for it: {cause.message}")
        return cause

    def _settle(self, outcome: Outcome) -> Outcome:
        """After a task: fetch its files, make ready for the next one, or never take one again."""
        late = self.couriers.finish() if self.couriers else None
        if late is not None and isinstance(outcome, Done):
            outcome = Lost(late, "its node died before it had handed over its files")
        self.busy, self.broken, self.task = False, not isinstance(outcome, Done), None
        if not self.broken:
            for actor in self.ranks:
                actor.reset.remote()  # runs while the driver prepares the next task
        return outcome

    def _whereabouts(self, rank: int) -> str:
        seat = self.seats.get(rank)
        return f" (pid {seat.pid} on {seat.host})" if seat else ""

    def close(self) -> None:
        self.broken = True
        remove_sign(self.sign)
        if self.couriers and self.ranks:
            if self.busy:
                self.couriers.finish(STOP_LIMIT)
            self.couriers.forget()
        for actor in self.ranks:
            ray.kill(actor, no_restart=True)
        if self.ranks:
            ray.util.remove_placement_group(self.placement.group)
        kill(self.processes)
        self.ranks, self.processes = [], []


def disconnect() -> None:
    """Leave the cluster, and no copies of files on it; end it if it is ours."""
    couriers.release()
    session.disconnect()


def processes_here(seats: Iterable[Seat]) -> list[psutil.Process]:
    """Of the ranks on this machine. Each remembers when it began: never another one with its id."""
    node, found = ray.get_runtime_context().get_node_id(), []
    for seat in seats:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [psutil.Process(seat.pid)] if seat.node == node else []
    return found


def kill(processes: list[psutil.Process]) -> None:
    """And wait until they are gone. A stopped process does not hear Ray."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=STOP_LIMIT)


class Pulse:
    """Asks each rank for a sign of life, a few times per `timeout` seconds, with one question in flight per rank.
    `questions`: a call of Ray's for each rank.

    The first answer may take as long as it likes: the rank waits for its place, or imports torch.
    """

    def __init__(self, questions: list[Callable[[], Any]], timeout: float):
        self.questions, self.timeout = questions, timeout
        self.interval = min(timeout / 4, 5.0)  # seconds
        self.asked: dict[Any, tuple[int, float]] = {}  # question -> rank, when
        self.alive: set[int] = set()  # ranks that have answered once
        self.due = 0.0

    def silent(self) -> Lost | None:
        """The rank that has not answered for too long, if there is one. Costs nothing until the next question is due."""
        now = time.monotonic()
        if now < self.due:
            return None
        if now > self.due + self.interval:  # this very process was stopped: answers may have to come in first
            self.asked = {question: (rank, now) for question, (rank, _) in self.asked.items()}
        self.due = now + self.interval
        if self.asked:
            answered, _ = ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0)
            for question in answered:
                self.alive.add(self.asked.pop(question)[0])
        for rank, asked in self.asked.values():
            if rank in self.alive and now - asked > self.timeout:
                return Lost(rank, f"no sign of life from rank {rank} for {self.timeout:g} s")
        self._ask(now)
        return None

    def _ask(self, now: float) -> None:
        open_ranks = {rank for rank, _ in self.asked.values()}
        for rank, question in enumerate(self.questions):
            if rank not in open_ranks:
                self.asked[question()] = (rank, now)
