"""A gang of one: this process alone, without Ray and without a process group."""

from __future__ import annotations

from typing import Any

from cluster.engines import make_worker
from cluster.tasks import Done, Failed, Outcome, Task, attempt


class LocalGang:
    """Runs each task within `start`. Ctrl-C passes through."""

    size = 1

    def __init__(self, name: str = "local"):
        self.name = name
        self.outcome: Done | Failed | None = None

    def start(self, task: Task) -> None:
        self.outcome = attempt(0, lambda: self.run(task))

    def run(self, task: Task) -> Any:
        import torch

        torch.set_num_threads(task.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return task.function(make_worker(task.engine, task.options, task.precision, 0, 1, device), task.argument)

    def poll(self, timeout: float) -> Outcome | None:
        outcome, self.outcome = self.outcome, None
        return outcome

    def close(self) -> None:
        """Nothing to end."""
