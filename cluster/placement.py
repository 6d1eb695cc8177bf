"""Where the workers of a gang go, and what is said while there is no room for them."""

from __future__ import annotations

import sys
import time
from typing import Literal

from cluster.session import capacity, ray
from cluster.tasks import CapacityError

LOOK = 0.2  # seconds between two looks at whether there is room
FIRST, AGAIN = 5.0, 60.0  # seconds after which waiting is told, and told again
PENDING = ("PENDING", "RESCHEDULING")  # Ray's words for groups without room


class Room:
    """Whether the cluster has room for a gang, and what is said while it has none."""

    def __init__(self, name: str, size: int, threads: int, gpus: int):
        self.name, self.size, self.threads, self.gpus = name, size, threads, gpus
        self.bundles = [{"CPU": threads, "GPU": gpus} if gpus else {"CPU": threads}] * size
        self.asked = time.monotonic()
        self.since: float | None = None  # when all places were found
        self.pending = False  # at the last look
        self.looked = 0.0
        self.told = self.asked + FIRST - AGAIN

    def state(self) -> str:
        """Of the group of places, in Ray's words."""
        raise NotImplementedError

    def seconds(self) -> float:
        """How long all workers have had their places; 0 while they wait for room, which is told now and then."""
        now = time.monotonic()
        if self.since is None and now - self.looked > LOOK:
            self.looked = now
            self._look(now)
        return now - self.since if self.since is not None else 0.0

    def _look(self, now: float) -> None:
        state = self.state()
        self.pending = state in PENDING
        if state == "CREATED":
            self.since = now
        elif self.pending and now - self.told > AGAIN:
            self.told = now
            print(self.message(), file=sys.stderr, flush=True)

    @property
    def waits(self) -> bool:
        """Whether there has been no room for so long that it is told."""
        self.seconds()
        return self.since is None and self.pending and time.monotonic() - self.asked > FIRST

    def message(self) -> str:
        free = ray.available_resources()
        have = ", ".join(f"{free.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
        each = f"({self.threads} CPUs, {self.gpus} GPUs)"
        waits = f"{self.name} waits for room for {self.size} workers x {each}: free on the cluster are {have}"
        try:
            capacity(self.size, self.threads, self.gpus)
        except CapacityError as error:
            return f"{waits}; as the cluster is now, it will never do: {error}"
        return waits


class Placement(Room):
    """A place for each worker of a gang, as soon as the cluster has room."""

    def __init__(self, name: str, size: int, threads: int, gpus: int, strategy: Literal["pack", "spread"]):
        super().__init__(name, size, threads, gpus)
        self.group = ray.util.placement_group(self.bundles, strategy=strategy.upper())

    def state(self) -> str:
        return str(ray.util.placement_group_table(self.group).get("state"))
