"""A disk that is full, or takes nothing: what is on it stays whole, one line names the file, and the same command goes on."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed")

from orchestrator import driver, files
from orchestrator.phases import PhaseStore, Record
from tests.cluster.nodes import elsewhere, require_mounts
from tests.faults import plant
from tests.orchestrator.test_faults import SOLO, Broken, start
from tests.orchestrator.test_study_on_ray import Running

FULL, READ_ONLY = "No space left on device", "Read-only file system"


# ------------------------------------------------------------------------------------------------------ a finished phase


@pytest.mark.parametrize("call", range(4))
def test_a_phase_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The disk refuses at each moment at which it may: two files, then the rename of their folder."""
    calls = iter(range(100))

    def refuse(original: object) -> object:
        def refusing(*args: object) -> object:
            if next(calls) == call:
                raise OSError(28, FULL)
            return original(*args)  # type: ignore[operator]

        return refusing

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    store = PhaseStore(tmp_path)
    record = Record({"weight": torch.ones(3)}, [{"step": 1}], {"steps": 1})
    if call < 3:
        with pytest.raises(OSError, match=FULL):
            store.put("phase", record)
        assert store.get("phase") is None
    store.put("phase", record)
    found = store.get("phase")
    assert found and found.rows == record.rows


def test_a_status_that_cannot_be_written_ends_the_study(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the driver's own thread, not in one that dies with a traceback while a trial goes on."""
    monkeypatch.setattr(driver, "TICK", 0.01)
    ticked = threading.Event()

    def tick() -> None:
        ticked.set()
        raise OSError(28, FULL, "status.json")

    with pytest.raises(OSError, match=r"status\.json"), driver.Ticker(tick):
        assert ticked.wait(5)
    assert not capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- in a trial


TRIAL = (
    ("disk", "put_fsync", 0, None, 0),
    ("read_only", "put", 0, None, 1),
    ("disk", "put_replace", 0, None, 2),
    ("read_only", "put_rename", 0, None, 3),
    ("disk", "row", 0, 10, 4),
    ("short", "row", 0, 15, 5),
    ("read_only", "row", 0, None, 6),
)


UNNAMED = ("put", "put_rename")  # where the planted error stands for one of the system's that names the file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Running:
    folder = tmp_path_factory.mktemp("whole")
    study = start(folder, SOLO, len(TRIAL), plant(folder / "faults").env)
    code, err = study.end()
    assert code == 0, err
    return study


@pytest.mark.slow
def test_each_trial_tells_in_one_line_and_goes_on(tmp_path: Path, whole: Running) -> None:
    study = Broken(tmp_path, SOLO, len(TRIAL))
    study.plant(*TRIAL)
    code, err = study.run()
    assert code == 3 and study.all_fired() and "Traceback" not in err, err
    told = [line for line in err.splitlines() if "FAILED" in line]
    assert len(told) == len(TRIAL)
    for (action, place, *_), line in zip(TRIAL, told, strict=True):
        assert {"disk": FULL, "read_only": READ_ONLY, "short": "took only a part of a line"}[action] in line
        assert place in UNNAMED or str(tmp_path / "runs") in line, line
    for file in study.last.study.glob("trials/*/metrics.jsonl"):
        files.read_lines(file)  # raises if a row is damaged
    code, err = study.run()
    assert code == 0, err
    study.equals(whole)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["commit_fsync", "commit_replace"])
@pytest.mark.parametrize("action", ["disk", "read_only"])
def test_a_result_that_cannot_be_written(tmp_path: Path, whole: Running, action: str, place: str) -> None:
    """The study's own files: it ends, in one line that names the file."""
    study = Broken(tmp_path, SOLO, 2)
    study.plant((action, place, 0, None, 0))
    code, err = study.run()
    assert code == 2 and study.all_fired(), err
    reason = FULL if action == "disk" else READ_ONLY
    assert err.splitlines()[-1] == f"{study.last.study / 'trials' / study.ids[0] / 'result.json'}: {reason}"
    assert "Traceback" not in err and not study.last.results()
    code, err = study.run()
    assert code == 0, err
    study.equals(whole)


# --------------------------------------------------------------------------------------------------------- a real disk


@pytest.mark.slow
@pytest.mark.parametrize("kib", [48, 112])
def test_a_small_disk(tmp_path: Path, whole: Running, kib: int) -> None:
    """It fills up wherever it does. Once it has grown, the same command finishes the study."""
    runs = tmp_path / "runs"
    runs.mkdir()
    require_mounts(runs)

    def body() -> None:
        study = Broken(tmp_path, SOLO, 2)
        study.plant()
        resize(runs, kib)
        code, err = study.run()
        assert code in (2, 3) and FULL in err and "Traceback" not in err, err
        resize(runs, 64 * 1024)
        code, err = study.run()
        assert code == 0, err
        study.equals(whole)

    elsewhere(runs, body)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)
