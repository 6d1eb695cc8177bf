"""The matrix of faults: whatever dies, stops, fills up or raises, wherever it stands, the study ends as if nothing had been."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

pytest.importorskip("ray", reason="Ray is not installed")

from orchestrator.files import append_line
from orchestrator.recipe import expand, load
from orchestrator.workloads import fingerprint
from tests.faults import DRIVER, Fault, Planted, plant
from tests.orchestrator.test_study_on_ray import Running, without_seconds
from tests.waiting import AT_ONCE, until

RECIPE = """
study: NAME
workload: {data: digits, model: {mlp: {width: 16, depth: 2}}, target: {test_accuracy: 0.9}}
cluster: CLUSTER
base: {epochs: EPOCHS, batch: 64, rate: {peak: 0.1}}
seeds: SEEDS
precision: fp32
checkpoint: {seconds: 0}
log_steps: 5
"""
TRIALS = 11
GANG, SOLO = "{workers: 2, timeout: 4}", "{launcher: solo}"


class Broken:
    """A study with faults planted in it. Seeds name its trials: seed n is trial n."""

    def __init__(self, folder: Path, cluster: str, trials: int = TRIALS):
        self.folder, self.cluster, self.trials = folder, cluster, trials
        self.ids = trial_ids(folder)

    def plant(self, *faults: tuple[str, str, int, int | None, int | None]) -> Planted:
        """Each (action, place, rank, step, seed)."""
        named = [Fault(a, p, r, s, None if seed is None else self.ids[seed]) for a, p, r, s, seed in faults]
        self.planted = plant(self.folder / "faults", named)
        return self.planted

    def run(self, words: Sequence[str] = ()) -> tuple[int, str]:
        """Until the study ends: exit code and what it printed. No process is left after it."""
        self.last = start(self.folder, self.cluster, self.trials, self.planted.env, words)
        code, err = self.last.end()
        until(lambda: not self.planted.left(), AT_ONCE)
        return code, err

    def all_fired(self) -> bool:
        return self.planted.fired() == self.planted.faults

    def equals(self, unbroken: Running) -> None:
        """Weights bit for bit; every row there, once; a result for each trial."""
        ids = set(self.ids[: self.trials])
        assert final_weights(self.last, ids) == final_weights(unbroken, ids)
        for trial in ids:
            rows = rows_of(self.last, trial)
            assert rows == rows_of(unbroken, trial)
            assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
        assert {r["trial"] for r in self.last.results().values() if r["status"] == "done"} == ids


def start(folder: Path, cluster: str, trials: int, env: dict[str, str], words: Sequence[str] = ()) -> Running:
    return Running(folder, "study", 2, str(trials), cluster=cluster, text=RECIPE, env=env, words=words)


def trial_ids(folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    text = RECIPE.replace("NAME", "study").replace("EPOCHS", "2").replace("SEEDS", str(TRIALS))
    (folder / "ids.yaml").write_text(text.replace("CLUSTER", GANG))
    return [trial.id for trial in expand(load(folder / "ids.yaml"), fingerprint, "fp32")]


def rows_of(study: Running, trial: str) -> list[dict[str, Any]]:
    lines = (study.study / "trials" / trial / "metrics.jsonl").read_text().splitlines()
    return without_seconds([json.loads(line) for line in lines])


def final_weights(study: Running, trials: set[str]) -> dict[str, bytes]:
    """Bytes of all phases on file, which hold as many rows as the trials do: one phase each."""
    files = sorted(study.phases.glob("*/weights.safetensors"))
    records = [json.loads((file.parent / "record.json").read_text())["rows"] for file in files]
    wanted = [without_seconds(rows) for rows in (rows_of(study, t) for t in trials)]
    found = {
        f"{file.parent.name}/{name}": array.tobytes()
        for file, rows in zip(files, records, strict=True)
        if without_seconds(rows) in wanted
        for name, array in load_file(file).items()
    }
    assert len({key.split("/")[0] for key in found}) == len(trials)
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Running:
    folder = tmp_path_factory.mktemp("unbroken")
    study = start(folder, GANG, TRIALS, plant(folder / "faults").env)
    code, err = study.end()
    assert code == 0, err
    return study


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Running:
    folder = tmp_path_factory.mktemp("alone")
    study = start(folder, SOLO, 2, plant(folder / "faults").env)
    code, err = study.end()
    assert code == 0, err
    return study


# --------------------------------------------------------------------------------------------------- ranks of a gang


KILLS = (
    ("kill", "join", 1, None, None),
    ("kill", "all_reduce", 1, 20, 1),
    ("kill", "evaluate", 0, None, 2),
    ("kill", "fsync", 0, 10, 3),
    ("kill", "put", 0, None, 4),
)


def test_killed_ranks(tmp_path: Path, unbroken: Running) -> None:
    """SIGKILL at five moments, in a trial each: before there is a process group, while the other rank waits in a collective,
    in evaluation, in a checkpoint, at the end. Each trial goes on with a new gang, and says so."""
    study = Broken(tmp_path, GANG, len(KILLS))
    study.plant(*KILLS)
    code, err = study.run()
    assert code == 0, err
    assert study.all_fired()
    study.equals(unbroken)
    lost = study.last.events("worker_lost")
    assert len(lost) == len(KILLS)
    told = {study.ids.index(event["trial"]): event["rank"] for event in lost if event["trial"] != study.ids[0]}
    assert told == {seed: rank for _, _, rank, _, seed in KILLS if seed}
    assert err.count("a new gang goes on") == len(KILLS)


@pytest.mark.slow
def test_failure_classes(tmp_path: Path, unbroken: Running) -> None:
    """What the cluster did is retried; what the user or the machine's limits did is told and not retried, and the
    same command finishes it once the cause is gone."""
    study = Broken(tmp_path, GANG, 6)
    infrastructure = (("port", "bind", 0, None, None), ("term", "step", 1, 12, 1), ("stop", "step", 1, 15, 2))
    ours = (("user", "step", 1, 10, 3), ("memory", "backward", 0, 10, 4), ("disk", "fsync", 0, 10, 5))
    study.plant(*infrastructure, *ours)
    code, err = study.run()
    assert code == 3 and study.all_fired(), err
    trials = study.last.study / "trials"
    errors = {seed: json.loads((trials / study.ids[seed] / "error.json").read_text()) for seed in (3, 4, 5)}
    assert (errors[3]["kind"], errors[3]["rank"], errors[3]["message"]) == ("ValueError", 1, "the planted error")
    assert "micro_batch" in errors[4]["hint"]
    assert "No space left on device" in errors[5]["message"] and str(trials / study.ids[5]) in errors[5]["message"]
    started = [study.ids.index(event["trial"]) for event in study.last.events("trial_started")]
    assert [started.count(seed) for seed in (3, 4, 5)] == [1, 1, 1]
    lines = err.splitlines()
    first = next(i for i, line in enumerate(lines) if "FAILED" in line)  # the root cause, not its effect on rank 0
    assert "seed 3: FAILED: rank 1 on" in lines[first] and "ValueError: the planted error (faults.py:" in lines[first]
    assert lines[first + 1] == f"  trial {study.ids[3]}; log: {trials / study.ids[3]}/logs/rank_1.log"
    reasons = [event["reason"] for event in study.last.events("worker_lost")]
    stalled = "no sign of life from rank 1|rank 1 does not get on"
    assert "Address already in use" in reasons[0] and any(re.search(stalled, reason) for reason in reasons)
    assert any("died" in reason for reason in reasons)  # a SIGTERM lets the rank end the trial that it is at
    for rank in (0, 1):  # where both stood when one had stopped
        log = (trials / study.ids[2] / "logs" / f"rank_{rank}.log").read_text()
        assert "trainer.py" in log and (rank == 0 or "(most recent call first)" in log)
    code, err = study.run()
    assert code == 0, err
    study.equals(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("action", ["kill", "term", "stop"])
def test_every_moment(tmp_path: Path, unbroken: Running, action: str, rank: int) -> None:
    study = Broken(tmp_path, GANG)
    places = ("start", "step", "backward", "all_reduce", "evaluate", "end")
    places += ("save", "fsync", "replace", "rename", "put")[: 5 * (rank == 0)]
    steps = {"step": 12, "backward": 17, "all_reduce": 20, "save": 5, "fsync": 10, "replace": 10, "rename": 15}
    study.trials = len(places)
    study.plant(*((action, place, rank, steps.get(place), seed) for seed, place in enumerate(places)))
    code, err = study.run()
    assert code == 0, err
    assert study.all_fired()
    study.equals(unbroken)


@pytest.mark.slow
def test_a_rank_that_waits_for_ever(tmp_path: Path, unbroken: Running) -> None:
    """It answers, but does not get on: the collective of the others times out, and both tell where they stand."""
    study = Broken(tmp_path, GANG, 1)
    study.plant(("hang", "step", 1, 12, 0))
    code, err = study.run()
    assert code == 0 and study.all_fired(), err
    assert "in strike" in (study.last.study / "trials" / study.ids[0] / "logs" / "rank_1.log").read_text()
    study.equals(unbroken)


@pytest.mark.slow
def test_the_retry_budget(tmp_path: Path, unbroken: Running) -> None:
    """Two losses of a trial are made good, a third ends it; the next run of the command has a new budget."""
    study = Broken(tmp_path, GANG, 1)
    study.plant(*(("kill", "step", rank, step, 0) for rank, step in ((1, 7), (0, 12), (1, 18))))
    code, err = study.run()
    assert code == 3 and study.all_fired() and "given up after 3 losses: cluster.max_failures is 2" in err
    code, err = study.run()
    assert code == 0, err
    study.equals(unbroken)


# ------------------------------------------------------------------------------------------------------ a full disk

LIMITED = """
import resource, sys
from pathlib import Path
from orchestrator.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
write_atomic(Path(sys.argv[1]), b"new" * 100)
"""


def test_the_system_refuses_a_file(tmp_path: Path) -> None:
    """A real refusal: the error names the file, its old content stays, nothing lies beside it."""
    file = tmp_path / "result.json"
    file.write_text("old")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(file)], capture_output=True, text=True, timeout=60)
    assert f"File too large: '{file}'" in done.stderr
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_no_room_for_a_row() -> None:
    with open("/dev/full", "ab", buffering=0) as full, pytest.raises(OSError, match=r"No space left .*'/dev/full'"):
        append_line(full, {"step": 1})


# ------------------------------------------------------------------------------------------------------- the driver


def broken_off(study: Broken, reference: Running, expected: int) -> None:
    """The first run ends by the fault; the same command then finishes the study."""
    began = time.monotonic()
    code, err = study.run()
    assert code == expected, err
    assert study.all_fired() and time.monotonic() - began < 60
    code, err = study.run()
    assert code == 0, err
    study.equals(reference)


@pytest.mark.parametrize(
    ("action", "place", "step", "expected"),
    [
        ("kill", "step", 12, -9),  # with launcher solo, the driver is the rank
        pytest.param("kill", "rename", 15, -9, marks=pytest.mark.slow),
        pytest.param("term", "evaluate", None, 75, marks=pytest.mark.slow),
        ("term", "fsync", 10, 75),
        pytest.param("disk", "replace", 10, 3, marks=pytest.mark.slow),
        pytest.param("read_only", "rename", 10, 3, marks=pytest.mark.slow),
    ],
)
def test_alone(tmp_path: Path, alone: Running, action: str, place: str, step: int | None, expected: int) -> None:
    study = Broken(tmp_path, SOLO, 2)
    study.plant((action, place, 0, step, 1))
    broken_off(study, alone, expected)


@pytest.mark.parametrize(
    ("action", "place", "call", "expected"),
    [
        ("kill", "commit", None, -9),
        pytest.param("kill", "journal", 3, -9, marks=pytest.mark.slow),  # before it tells of the second trial
        pytest.param("disk", "journal", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_driver(tmp_path: Path, alone: Running, action: str, place: str, call: int | None, expected: int) -> None:
    """Between two trials, where driver and files could disagree about what is done."""
    study = Broken(tmp_path, SOLO, 2)
    study.plant((action, place, DRIVER, call, None))
    broken_off(study, alone, expected)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "term"])
@pytest.mark.parametrize("place", ["open", "journal", "commit", "close"])
def test_driver_of_a_gang(tmp_path: Path, unbroken: Running, action: str, place: str) -> None:
    study = Broken(tmp_path, GANG, 2)
    study.plant((action, place, DRIVER, None, None))
    code, err = study.run()
    late = (action, place) == ("term", "close")  # by then, all trials are done and on file
    assert study.all_fired() and (late or code == {"kill": -9, "term": 75}[action]), err
    code, err = study.run()
    assert code == 0, err
    study.equals(unbroken)
