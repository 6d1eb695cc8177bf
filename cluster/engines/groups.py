"""Process groups beside that of all workers: they keep its time limit, and two workers need not have made equally many."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

c10d: Any = dist.distributed_c10d


def patience() -> timedelta:
    """How long collectives of the group of all wait; torch by itself would give each other group half an hour."""
    world: Any = dist.group.WORLD
    return world._get_backend(torch.device("cpu")).options._timeout


class Groups:
    """Of some of the workers, by their ranks; each is made once in the life of the group of all."""

    def __init__(self) -> None:
        self.world: Any = None
        self.made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def among(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """Made when its ranks first ask for it, who alone call this."""
        if self.world is not dist.group.WORLD:
            self.world, self.made = dist.group.WORLD, {}
        if ranks not in self.made:
            self.made[ranks] = make(ranks)
        return self.made[ranks]


def make(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """Named by its ranks. torch also puts into the name how many groups this rank has, by which its members would look for
    each other under different names and wait in vain."""
    hashed = c10d._hash_ranks_to_str
    c10d._hash_ranks_to_str = lambda members: "among " + " ".join(map(str, members))
    try:
        return dist.new_group(list(ranks), patience(), use_local_synchronization=True)
    finally:
        c10d._hash_ranks_to_str = hashed


groups = Groups()
