"""One trial's life, walked through with a gang that plays back outcomes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from cluster.controller import Action, Life, State, advance
from cluster.policies import FailurePolicy
from cluster.tasks import Done, Failed, Gang, Lost, Outcome, Task

DONE = Done(1)
LOST = Lost(1, "process died")
PREEMPTED = Lost(0, "node taken", preempted=True)
USER = Failed(1, "host", "ValueError", "bad label", "data.py:3", "")
PEER = Failed(0, "host", "RuntimeError", "[gloo/transport/tcp/pair.cc:547] Connection closed by peer", "", "")
MEMORY = Failed(0, "host", "OutOfMemoryError", "CUDA out of memory", "", "")
OUTCOMES = (DONE, LOST, PREEMPTED, USER, PEER, MEMORY)
TASK = Task(print, None)


class FakeGang:
    """Plays one outcome, and refuses what a real gang refuses."""

    size, name, waits = 2, "fake", False

    def __init__(self, script: Iterable[Outcome]):
        self.script, self.broken, self.started, self.closed = iter(script), False, False, False

    def start(self, task: Task) -> None:
        assert not (self.started or self.broken or self.closed)
        self.started = True

    def poll(self, timeout: float) -> Outcome | None:
        assert self.started
        outcome = next(self.script)
        self.started, self.broken = False, not isinstance(outcome, Done)
        return outcome

    def close(self) -> None:
        self.closed = True


def live(script: Iterable[Outcome], max_failures: int = 2) -> tuple[Life, list[Action], int]:
    """-> the finished life, the actions taken, the gangs used."""
    script, policy = iter(script), FailurePolicy(max_failures)
    gang: Gang = FakeGang(script)
    gangs = 1
    life, action = advance(Life(), None, policy)
    actions = [action]
    while action is not Action.FINISH:
        if action is Action.RESUME:
            gang.close()
            gang, gangs = FakeGang(script), gangs + 1
            life, _ = advance(life, None, policy)
        gang.start(TASK)
        life, action = advance(life, gang.poll(1), policy)
        actions.append(action)
    return life, actions, gangs


def test_the_plain_course() -> None:
    life, actions, gangs = live([DONE])
    assert (life, actions, gangs) == (Life(State.DONE), [Action.START, Action.FINISH], 1)


@pytest.mark.parametrize("loss", [LOST, PEER])
def test_losses_are_retried_on_new_gangs_up_to_the_limit(loss: Outcome) -> None:
    life, actions, gangs = live([loss, loss, DONE])
    assert life == Life(State.DONE, failures=2) and gangs == 3
    assert actions == [Action.START, Action.RESUME, Action.RESUME, Action.FINISH]
    life, _, gangs = live([loss, loss, loss])
    assert life.state is State.FAILED and gangs == 3
    assert life.hint == "given up after 3 losses: cluster.max_failures is 2"
    assert live([loss], max_failures=0)[0].state is State.FAILED


def test_user_errors_are_not_retried() -> None:
    assert live([USER])[0] == Life(State.FAILED)


def test_out_of_memory_is_not_retried_and_says_what_to_set() -> None:
    life, actions, _ = live([MEMORY])
    assert life.state is State.FAILED and "base.micro_batch" in life.hint and actions[-1] is Action.FINISH


def test_preemption_is_free() -> None:
    life, _, gangs = live([PREEMPTED] * 10 + [LOST, LOST, DONE])
    assert life == Life(State.DONE, failures=2, preemptions=10) and gangs == 13


@pytest.mark.parametrize("script", list(itertools.product(OUTCOMES, repeat=4)))
def test_every_course_of_four_outcomes_ends_as_its_first_decisive_one_says(script: tuple[Outcome, ...]) -> None:
    charged = 0
    for end, outcome in enumerate(script):
        charged += outcome in (LOST, PEER)
        if outcome in (DONE, USER, MEMORY) or charged > 2:
            life, actions, gangs = live(script)
            assert life.state is (State.DONE if outcome is DONE else State.FAILED)
            assert (life.failures, gangs, len(actions)) == (min(charged, 2), end + 1, end + 2)
            return
    with pytest.raises(StopIteration):
        live(script)


@pytest.mark.parametrize("outcome", [None, *OUTCOMES])
@pytest.mark.parametrize("state", [State.DONE, State.FAILED])
def test_nothing_follows_the_end(state: State, outcome: Outcome | None) -> None:
    with pytest.raises(ValueError, match=f"a trial that is {state.value} cannot go on"):
        advance(Life(state), outcome, FailurePolicy())


def test_a_running_trial_is_not_started_again() -> None:
    with pytest.raises(ValueError, match="running"):
        advance(Life(State.RUNNING), None, FailurePolicy())


@pytest.mark.parametrize(
    "failed, peer, memory",
    [
        (USER, False, False),
        (PEER, True, False),
        (MEMORY, False, True),
        (Failed(0, "", "DistBackendError", "NCCL error", "", ""), True, False),
        (
            Failed(0, "", "RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes", "", ""),
            False,
            True,
        ),
        (Failed(0, "", "RuntimeError", "mat1 and mat2 shapes cannot be multiplied", "", ""), False, False),
        (Failed(0, "", "ValueError", "gloo: connection closed", "", ""), False, False),
    ],
)
def test_failures_are_told_apart(failed: Failed, peer: bool, memory: bool) -> None:
    assert (failed.lost_peer, failed.out_of_memory) == (peer, memory)
