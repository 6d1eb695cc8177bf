"""A gang of one: this process alone, without Ray and without a process group."""

from __future__ import annotations

from typing import Any

from cluster import stacks
from cluster.engines import make_worker
from cluster.tasks import Outcome, Task, attempt


class LocalGang:
    """Runs each task within `poll`, however long it takes. Ctrl-C passes through."""

    size, waits = 1, False

    def __init__(self, name: str = "local"):
        self.name = name
        self.task: Task | None = None
        stacks.listen()

    def start(self, task: Task) -> None:
        self.task = task

    def run(self, task: Task) -> Any:
        import torch

        torch.set_num_threads(task.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return task.function(make_worker(task.engine, task.options, task.precision, 0, 1, device), task.argument)

    def poll(self, timeout: float) -> Outcome | None:
        task, self.task = self.task, None
        return attempt(0, lambda: self.run(task)) if task else None

    def close(self) -> None:
        """Nothing to end."""
