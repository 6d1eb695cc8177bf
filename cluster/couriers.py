"""Between the driver and the nodes that do not see its files: an actor on each such node keeps a `Mirror` there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.actor import Seat
from cluster.mirror import Mirror, contents, take_in
from cluster.session import ray
from cluster.tasks import Files

PERIOD = 1.0  # seconds between two looks at a node's files
LAST_LIMIT = 60.0  # seconds in which a node must hand over the last of its files
RELEASE_LIMIT = 5.0  # seconds in which a node must remove its copies

mirrors: dict[str, Any] = {}  # node -> actor, shared by all gangs
parcels: dict[Path, Any] = {}  # folders that never change, in Ray's store: read once, sent to each node once


def mirror_on(node: str) -> Any:
    if node not in mirrors:
        place = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        mirrors[node] = ray.remote(Mirror).options(num_cpus=0, scheduling_strategy=place).remote()
    return mirrors[node]


def parcel(folder: Path) -> Any:
    if folder not in parcels:
        parcels[folder] = ray.put(contents([folder]))
    return parcels[folder]


def release() -> None:
    """Remove all copies, before the driver leaves the cluster."""
    gone = [actor.remove.remote() for actor in mirrors.values()]
    if gone:
        ray.wait(gone, num_returns=len(gone), timeout=RELEASE_LIMIT)
    mirrors.clear()
    parcels.clear()


class Couriers:
    """The files of one gang on other nodes."""

    def __init__(self, gang: str, seats: Sequence[Seat]):
        self.gang, self.seats = gang, seats
        self.first = next(seat.node for seat in seats if seat.rank == 0)
        self.mirrors = {seat.node: mirror_on(seat.node) for seat in seats if not seat.sees_files}
        self.writes: tuple[Path, ...] = ()
        self.asked: dict[Any, str] = {}  # question in flight -> node
        self.due = 0.0
        self.gone: set[str] = set()  # nodes from which not all that was written can come back

    def send(self, files: Files) -> dict[str, Any]:
        """For each of the nodes: a call that gives the place of its copies once they are there."""
        self.writes = files.writes
        return {node: self._send(node, actor, files) for node, actor in self.mirrors.items()}

    def _send(self, node: str, actor: Any, files: Files) -> Any:
        for folder in ray.get(actor.missing.remote(files.constant)):
            actor.keep.remote(folder, parcel(folder))
        needed = contents(files.reads, logs_only=node != self.first)
        return actor.receive.remote(self.gang, files.writes, needed, files.constant)

    def look(self) -> None:
        """Take in what nodes have written. Waits for none of them."""
        if time.monotonic() >= self.due:
            self.due = time.monotonic() + PERIOD
            self._ask()
        if self.asked:
            answers, _ = ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0)
            for answer in answers:
                self._take_in(answer)

    def _ask(self) -> None:
        for node in self.mirrors.keys() - set(self.asked.values()):
            self.asked[self.mirrors[node].changes.remote(self.gang)] = node

    def _take_in(self, answer: Any) -> None:
        node = self.asked.pop(answer)
        try:
            take_in(ray.get(answer), self.writes)
        except ray.exceptions.RayError:  # most often with its node, and the gang will notice
            mirrors.pop(node, None)
            del self.mirrors[node]
            self.gone.add(node)

    def finish(self, limit: float = LAST_LIMIT) -> int | None:
        """Take in all that is left. The first rank whose node has not handed over its files; None where all have."""
        end = time.monotonic() + limit
        for _ in range(2):  # an answer that is on its way may be older than the last write
            self._ask()
            while self.asked and (left := end - time.monotonic()) > 0:
                for answer in ray.wait(list(self.asked), timeout=left)[0]:
                    self._take_in(answer)
        missing = self.gone.union(self.asked.values())
        return min((seat.rank for seat in self.seats if seat.node in missing), default=None)

    def forget(self) -> None:
        for actor in self.mirrors.values():
            actor.forget.remote(self.gang)
