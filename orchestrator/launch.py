"""Where gangs come from: this process alone, or Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cluster.local import LocalGang
from cluster.tasks import Gang
from orchestrator.recipe.schema import Cluster


class Launcher:
    """Opens, replaces and closes the gangs that a recipe's `cluster` asks for."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        one = cluster.workers == 1 and cluster.gangs in (1, "auto")
        self.solo = cluster.launcher == "solo" or (cluster.launcher == "auto" and one)
        self.disconnect: Callable[[], None] = lambda: None

    def open(self, trials: int) -> list[Gang]:
        """As many gangs as the recipe says, the cluster holds and the trials can use. Raises ClusterError."""
        if self.solo:
            return [LocalGang()]
        from cluster import gang

        self.disconnect = gang.disconnect
        wanted = self.cluster.gangs
        gang.connect(self.cluster.workers * self.cluster.threads * (1 if wanted == "auto" else wanted))
        room = gang.capacity(self.cluster.workers, self.cluster.threads)
        return [self._gang(i) for i in range(min(room if wanted == "auto" else wanted, room, trials))]

    def _gang(self, number: int) -> Gang:
        from cluster import gang

        cluster = self.cluster
        return gang.RayGang(cluster.workers, cluster.threads, timeout=cluster.timeout, name=f"gang{number}")

    def replace(self, gang: Gang) -> Gang:
        """A new gang for one that can no longer be used."""
        gang.close()
        return LocalGang() if self.solo else self._gang(int(gang.name.removeprefix("gang")))

    def close(self, gangs: Iterable[Gang]) -> None:
        """End these gangs, and leave the cluster."""
        for gang in gangs:
            gang.close()
        self.disconnect()
