"""Room for a gang: what is said while there is none, and when another gang may take its trial over."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster import placement, ray_train
from cluster.placement import Room
from cluster.ray_train import TrainRoom


class Told(Room):
    said = "PENDING"

    def state(self) -> str:
        return self.said

    def message(self) -> str:
        return f"{self.name} waits"


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    clock = [1000.0]
    monkeypatch.setattr(placement.time, "monotonic", lambda: clock[0])

    def wait(seconds: float) -> None:
        clock[0] += seconds

    return wait


def test_waiting_is_told_after_five_seconds_and_each_minute(
    wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    room, told = Told("gang0", 2, 1, 0), []
    for _ in range(130):
        wait(1.0)
        assert room.seconds() == 0
        told.append(capsys.readouterr().err)
    assert [second for second, line in enumerate(told, 1) if line] == [6, 67, 128]


def test_a_gang_waits_while_it_is_told_so(wait: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    room = Told("gang0", 2, 1, 0)
    wait(1.0)
    assert not room.waits  # every gang does, for a moment
    wait(5.0)
    assert room.waits
    room.said = ""  # it has its room, and starts
    wait(1.0)
    assert not room.waits
    room.said = "CREATED"
    wait(1.0)
    assert room.seconds() == 0 and not room.waits
    wait(3.0)
    assert room.seconds() == 3.0
    assert capsys.readouterr().err.count("gang0 waits") == 1


@pytest.mark.parametrize(
    ("states", "seated", "expected"),
    [
        ([], False, ""),
        (["CREATED"], False, ""),  # perhaps another gang's
        (["CREATED", "PENDING"], False, "PENDING"),
        (["PENDING"], True, "CREATED"),
    ],
)
def test_groups_of_ray_train_are_told_by_their_shape(
    states: list[str], seated: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {str(i): {"state": state, "bundles": {0: {"CPU": 1.0}, 1: {"CPU": 1.0}}} for i, state in enumerate(states)}
    table["other"] = {"state": "PENDING", "bundles": {0: {"CPU": 1.0}}}
    monkeypatch.setattr(ray_train.ray.util, "placement_group_table", lambda: table)
    room = TrainRoom("gang0", 2, 1, 0)
    room.seated = seated
    assert room.state() == expected
