"""Where gangs come from: this process alone, the ranks of torchrun, or Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cluster import torchrun
from cluster.address import address
from cluster.local import LocalGang
from cluster.tasks import Gang
from orchestrator.recipe.schema import Cluster

IN_PROCESS = ("solo", "torchrun")  # trials run in the driver's own process


def kind(cluster: Cluster) -> str:
    """Which launcher `auto` is."""
    if cluster.launcher != "auto":
        return cluster.launcher
    one = cluster.workers == 1 and cluster.gangs in (1, "auto")
    return "torchrun" if torchrun.started() else "solo" if one else "gang"


def elsewhere(cluster: Cluster) -> bool:
    """Whether workers train on machines of the user's cluster, which need not be like the driver's."""
    return kind(cluster) not in IN_PROCESS and bool(address())


class Launcher:
    """Opens, replaces and closes the gangs that a recipe's `cluster` asks for. `folder`: where trials write."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        self.kind = kind(cluster)
        self.gpus = 0  # per worker, of each gang of the study: never fewer because a node is away
        self.in_process = self.kind in IN_PROCESS
        self.disconnect: Callable[[], None] = lambda: None

    def open(self, trials: int) -> list[Gang]:
        """As many gangs as the recipe says, the cluster holds and the trials can use. Raises ClusterError."""
        if self.in_process:
            return [self._gang(0)]
        from cluster import gang

        self.disconnect = gang.disconnect
        wanted = self.cluster.gangs
        gang.connect(self.cluster.workers * self.cluster.threads * (1 if wanted == "auto" else wanted))
        self.gpus = gang.gpus_each(self.cluster.workers)
        room = gang.capacity(self.cluster.workers, self.cluster.threads, self.gpus)
        return [self._gang(i) for i in range(min(room if wanted == "auto" else wanted, room, trials))]

    def _gang(self, number: int) -> Gang:
        workers, threads, timeout = self.cluster.workers, self.cluster.threads, self.cluster.timeout
        if self.kind == "solo":
            return LocalGang()
        if self.kind == "torchrun":
            return torchrun.TorchrunGang(workers, timeout)
        made = train_gang() if self.kind == "ray_train" else ray_gang()
        place = {"placement": self.cluster.placement, "folder": self.folder}
        return made(workers, threads, self.gpus, timeout=timeout, name=f"gang{number}", **place)

    def replace(self, gang: Gang) -> Gang | None:
        """A new gang for one that can no longer be used; None where lost workers cannot be started anew from here."""
        gang.close()
        if isinstance(gang, torchrun.TorchrunGang) and gang.lost:
            return None
        return self._gang(0 if self.in_process else int(gang.name.removeprefix("gang")))

    def close(self, gangs: Iterable[Gang]) -> None:
        """End these gangs, and leave the cluster."""
        for gang in gangs:
            gang.close()
        self.disconnect()


def ray_gang() -> Callable[..., Gang]:
    from cluster.gang import RayGang

    return RayGang


def train_gang() -> Callable[..., Gang]:
    from cluster.ray_train import TrainGang

    return TrainGang
