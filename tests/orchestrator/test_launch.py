"""Where gangs come from and where their trials go: a gang that finds no room, a node that is gone with its GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from cluster import gang as ray_gangs
from cluster import session
from cluster.local import LocalGang
from cluster.tasks import Done, Outcome, Task
from orchestrator import launch
from orchestrator.driver import Driver, drive
from orchestrator.launch import Launcher
from orchestrator.recipe import load
from orchestrator.recipe.schema import Cluster
from orchestrator.study import Study

RECIPE = """
study: small
workload: {data: digits, model: {mlp: {width: 8, depth: 1}}}
cluster: {launcher: solo}
base: {steps: 2, batch: 64, rate: {peak: 0.1}}
seeds: 3
"""


class Ready(LocalGang):
    """Has done its task as soon as it is asked."""

    def poll(self, timeout: float) -> Outcome | None:
        return Done({"began": 0.0, "ended": 1.0, "status": "done"})


class Late(LocalGang):
    """Finds no room, for ever."""

    waits, polls, closed = True, 0, False

    def start(self, task: Task) -> None:
        assert not self.closed

    def poll(self, timeout: float) -> Outcome | None:
        self.polls += 1
        assert self.polls < 20, "the study goes on for ever"
        return None

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_a_trial_whose_gang_finds_no_room_goes_to_an_idle_one(
    order: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may hold the very room that the other waits for."""
    gangs = [Ready("gang0"), Late("gang1"), Late("gang2")]
    monkeypatch.setattr(Launcher, "open", lambda launcher, trials: [gangs[i] for i in order])
    monkeypatch.setattr(Driver, "_commit", lambda driver, run, result: None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    assert drive(Study(load(recipe), RECIPE, tmp_path / "runs")) == 0
    assert all(gang.closed for gang in gangs if isinstance(gang, Late))
    journal = [json.loads(line) for line in (tmp_path / "runs/small/journal.jsonl").read_text().splitlines()]
    assert [e["gang"] for e in journal if e["event"] == "trial_started"].count("gang0") == 3
    assert {e.get("attempt") for e in journal if e["event"] == "trial_started"} == {1}


def test_a_new_gang_waits_for_as_many_gpus_as_the_first_one_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a node is gone, the GPUs that are left may be too few: that is no reason to go on without them."""
    made: list[tuple[Any, ...]] = []

    class Stub(LocalGang):
        def __init__(self, *arguments: Any, name: str, **options: Any) -> None:
            super().__init__(name)
            made.append(arguments)

    left = {"GPU": 2.0}
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: left)
    monkeypatch.setattr(session.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0, "GPU": 2.0}}])
    monkeypatch.setattr(ray_gangs, "connect", lambda cpus: None)
    monkeypatch.setattr(launch, "ray_gang", lambda: Stub)
    launcher = Launcher(Cluster(workers=2), Path())
    (gang,) = launcher.open(1)
    left["GPU"] = 1.0
    launcher.replace(gang)
    assert made == [(2, 1, 1), (2, 1, 1)]
