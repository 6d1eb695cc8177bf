"""Where the workers of a gang go, and what is said while there is no room for them."""

from __future__ import annotations

import sys
import time
from typing import Literal

from cluster.session import capacity, ray
from cluster.tasks import CapacityError

LOOK = 0.2  # seconds between two looks at whether there is room
FIRST, AGAIN = 5.0, 60.0  # seconds after which waiting is told, and told again


class Placement:
    """A place for each worker of a gang, as soon as the cluster has room."""

    def __init__(self, name: str, size: int, threads: int, gpus: int, strategy: Literal["pack", "spread"]):
        self.name, self.size, self.threads, self.gpus = name, size, threads, gpus
        bundle = {"CPU": threads, "GPU": gpus} if gpus else {"CPU": threads}
        self.group = ray.util.placement_group([bundle] * size, strategy=strategy.upper())
        self.since: float | None = None  # when all places were found
        self.looked = 0.0
        self.told = time.monotonic() + FIRST - AGAIN

    def seconds(self) -> float:
        """How long all workers have had their places; 0 while they wait for room, which is told now and then."""
        now = time.monotonic()
        if self.since is None and now - self.looked > LOOK:
            self.looked = now
            if ray.util.placement_group_table(self.group).get("state") == "CREATED":
                self.since = now
            elif now - self.told > AGAIN:
                self.told = now
                print(self.message(), file=sys.stderr, flush=True)
        return now - self.since if self.since is not None else 0.0

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
