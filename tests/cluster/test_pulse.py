"""Signs of life: who is silent for too long is told, but not because the one who asks was away."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from cluster import gang
from cluster.gang import Pulse
from cluster.tasks import Lost


class Fake:
    """A rank whose answers to `ping` are numbers, and may never come."""

    numbers = itertools.count()

    @property
    def ping(self) -> Fake:
        return self

    def options(self, concurrency_group: str) -> Fake:
        return self

    def remote(self) -> int:
        return next(self.numbers)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    clock = {"now": 1000.0}
    monkeypatch.setattr(gang.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(gang.ray, "wait", lambda questions, **_: ([], questions))
    return clock


def test_a_silent_rank(time: dict[str, float]) -> None:
    pulse = Pulse([Fake()], timeout=4.0)
    told: list[Any] = []
    for _ in range(12):
        told.append(pulse.silent())
        time["now"] += 0.5
    assert told[:8] == [None] * 8
    assert any(lost == Lost(0, "no sign of life from rank 0 for 4 s") for lost in told[8:])


def test_the_driver_was_stopped(time: dict[str, float]) -> None:
    """For 100 s. The answers that came meanwhile must have the time to be taken in."""
    pulse = Pulse([Fake()], timeout=4.0)
    assert pulse.silent() is None
    time["now"] += 100.0
    assert pulse.silent() is None
    time["now"] += 1.0
    assert pulse.silent() is None
    for _ in range(4):
        time["now"] += 1.0
        lost = pulse.silent()
    assert isinstance(lost, Lost)
