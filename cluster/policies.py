"""What to do when a trial's gang is lost or its function raises: policies of one method that return a decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cluster.tasks import Failed, Lost

MEMORY_HINT = "out of memory: set base.micro_batch to a smaller number than now"


@dataclass(frozen=True)
class Decision:
    retry: bool
    charged: bool = False  # counts against max_failures
    hint: str = ""  # one line for the user


class Policy(Protocol):
    def decide(self, outcome: Failed | Lost, failures: int) -> Decision:
        """`failures`: retries that this trial has been charged for so far."""


@dataclass(frozen=True)
class FailurePolicy:
    """The user's errors end the trial, the cluster's are retried, and being preempted costs nothing."""

    max_failures: int = 2  # per trial

    def decide(self, outcome: Failed | Lost, failures: int) -> Decision:
        if isinstance(outcome, Lost) and outcome.preempted:
            return Decision(retry=True)
        if isinstance(outcome, Failed) and outcome.out_of_memory:
            return Decision(retry=False, hint=MEMORY_HINT)
        if isinstance(outcome, Failed) and not outcome.lost_peer:
            return Decision(retry=False)
        if failures < self.max_failures:
            return Decision(retry=True, charged=True)
        hint = f"given up after {failures + 1} losses: cluster.max_failures is {self.max_failures}"
        return Decision(retry=False, hint=hint)
