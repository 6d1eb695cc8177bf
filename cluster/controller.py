"""One trial's life as a state machine. Pure: no I/O, no clock, no gang, so that every path is tested.

Pending goes to running; running to done, failed or resuming; resuming goes back to running on a new gang.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from cluster.policies import Policy
from cluster.tasks import Done, Failed, Lost, Outcome


class State(Enum):
    PENDING = "pending"
    RUNNING = "running"
    RESUMING = "resuming"
    DONE = "done"
    FAILED = "failed"


class Action(Enum):
    START = "start"  # from the beginning, on any gang
    RESUME = "resume"  # from the newest checkpoint, on a new gang
    FINISH = "finish"  # record the outcome; close the gang unless the trial is done


@dataclass(frozen=True)
class Life:
    """Where a trial stands."""

    state: State = State.PENDING
    failures: int = 0  # losses charged so far
    preemptions: int = 0
    hint: str = ""  # for the user, once the trial has failed

    @property
    def over(self) -> bool:
        return self.state in (State.DONE, State.FAILED)


def advance(life: Life, outcome: Outcome | None, policy: Policy) -> tuple[Life, Action]:
    """The next state, and what to do. `outcome` None: a gang is free for the trial. Raises ValueError after the end."""
    if life.over or (life.state, outcome) == (State.RUNNING, None):
        raise ValueError(f"a trial that is {life.state.value} cannot go on with {outcome}")
    if outcome is None:
        action = Action.START if life.state is State.PENDING else Action.RESUME
        return replace(life, state=State.RUNNING), action
    if isinstance(outcome, Done):
        return replace(life, state=State.DONE), Action.FINISH
    return after_loss(life, outcome, policy)


def after_loss(life: Life, outcome: Failed | Lost, policy: Policy) -> tuple[Life, Action]:
    decision = policy.decide(outcome, life.failures)
    if not decision.retry:
        return replace(life, state=State.FAILED, hint=decision.hint), Action.FINISH
    failures, preemptions = life.failures + decision.charged, life.preemptions + (not decision.charged)
    return replace(life, state=State.RESUMING, failures=failures, preemptions=preemptions), Action.RESUME
