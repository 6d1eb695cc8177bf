"""Signs of life: who is silent for too long is told, but not because the one who asks was away."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from cluster import gang
from cluster.gang import Pulse
from cluster.tasks import Lost


def asked() -> list[Callable[[], int]]:
    """One rank, whose answers are numbers, and may never come."""
    return [itertools.count().__next__]


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Answers come while `answers` is not 0."""
    clock = {"now": 1000.0, "answers": 0.0}
    monkeypatch.setattr(gang.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(
        gang.ray, "wait", lambda questions, **_: (questions, []) if clock["answers"] else ([], questions)
    )
    return clock


@pytest.fixture
def pulse(time: dict[str, float]) -> Pulse:
    """Of a rank that has answered once, and was asked again."""
    pulse = Pulse(asked(), timeout=4.0)
    for time["answers"] in (0.0, 1.0):
        assert pulse.silent() is None
        time["now"] += 1.0
    time["answers"] = 0.0
    return pulse


def test_a_rank_that_starts_may_be_silent(time: dict[str, float]) -> None:
    """It waits for its place, or imports torch."""
    pulse = Pulse(asked(), timeout=4.0)
    for _ in range(20):
        assert pulse.silent() is None
        time["now"] += 0.5


def test_a_silent_rank(time: dict[str, float], pulse: Pulse) -> None:
    told: list[Any] = []
    for _ in range(12):
        told.append(pulse.silent())
        time["now"] += 0.5
    assert told[:8] == [None] * 8
    assert any(lost == Lost(0, "no sign of life from rank 0 for 4 s") for lost in told[8:])


def test_the_driver_was_stopped(time: dict[str, float], pulse: Pulse) -> None:
    """For 100 s. The answers that came meanwhile must have the time to be taken in."""
    assert pulse.silent() is None
    time["now"] += 100.0
    assert pulse.silent() is None
    time["now"] += 1.0
    assert pulse.silent() is None
    for _ in range(4):
        time["now"] += 1.0
        lost = pulse.silent()
    assert isinstance(lost, Lost)
