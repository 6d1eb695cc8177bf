from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.files import write_json
from orchestrator.progress import Progress, duration, ended_line, follow, read_status, render, show_status


def a_status(**changes: Any) -> dict[str, Any]:
    trials = {"total": 24, "done": 11, "failed": 1, "diverged": 0, "running": 1, "left": 11}
    row = {"trial": "a", "arm": "sgd", "batch": 128, "seed": 1, "step": 40, "steps": 140, "epoch": 1.78}
    running = [row | {"train_loss": 0.3125, "test_accuracy": 0.95, "examples_per_second": 6244.0}]
    now = time.time()
    driver = {"pid": os.getpid(), "host": socket.gethostname(), "started": now - 9, "updated": now}
    times = {"eta_seconds": 41.2, "gap_seconds": 0.1, "startup_seconds": 1.0}
    return (
        {"study": "quick", "state": "running", "exit_code": None, "trials": trials, "running": running}
        | driver
        | times
        | changes
    )


def a_result(**changes: Any) -> dict[str, Any]:
    target = {"metric": "test_accuracy", "value": 0.95, "reached": True, "step": 140}
    name = {"trial": "a", "arm": "sgd", "batch": 128, "seed": 1, "status": "done", "steps": 160, "reused": False}
    parts = {"final": {"test_accuracy": 0.9722, "train_loss": 0.1}, "target": target, "seconds": {"train": 1.31}}
    return name | parts | {"error": None} | changes


def shown(status: dict[str, Any], width: int = 120) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), highlight=False)
    console.print(render(status))
    return console.export_text()


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=120, highlight=False)


def plain() -> Console:
    return Console(file=io.StringIO(), width=80, highlight=False)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "quick"
    path.mkdir()
    return path


@pytest.fixture
def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_view_has_counts_eta_and_running_trials() -> None:
    text = shown(a_status())
    assert "quick  running  11 of 24 trials done, 1 failed, 1 running, 11 left  ETA 0:41" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["trial", "sgd"]
    row = next(line.split() for line in text.splitlines() if "batch" in line)
    assert row == ["sgd", "batch", "128", "seed", "1", "40/140", "1.78", "0.3125", "0.95", "6,244"]


def test_view_of_a_trial_without_metrics_and_of_an_unknown_eta() -> None:
    bare = {"trial": "a", "arm": "sgd", "batch": 128, "seed": 1, "step": 0, "steps": 140, "train_loss": None}
    text = shown(a_status(running=[bare], eta_seconds=None))
    assert "ETA ?" in text and "0/140" in text and "None" not in text


def test_view_of_a_trial_whose_budget_is_in_epochs() -> None:
    row = a_status()["running"][0] | {"steps": None, "epochs": 20.0}
    text = shown(a_status(running=[row, row | {"step": None, "epoch": None}]))
    lines = [line.split() for line in text.splitlines() if "batch" in line]
    assert lines[0][5:7] == ["40", "1.78/20"] and lines[1][5:7] == ["-", "-/20"]


def test_view_stays_short_with_many_gangs() -> None:
    text = shown(a_status(running=a_status()["running"] * 40))
    assert len(text.splitlines()) < 20 and "and 28 more" in text


def test_silent_study_is_told() -> None:
    assert "no news for 2:00" in shown(a_status(updated=time.time() - 120))
    assert "no news" not in shown(a_status(state="done", updated=time.time() - 120, running=[]))


def test_names_neither_steer_the_terminal_nor_are_markup() -> None:
    row = a_status()["running"][0] | {"arm": "\x1b]0;owned\x07[red]x"}
    text = shown(a_status(study="\x1b[2Jquick", running=[row]))
    assert "\x1b" not in text and "\x07" not in text and "[red]x" in text
    assert "\x1b" not in ended_line(a_result(status="failed", error="\x1b[2Jbad\nworse"), a_status())


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0.4, "0:00"), (41.2, "0:41"), (59.9, "1:00"), (3723, "1:02:03")]
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "target 0.95 at step 140, accuracy 0.9722, 1.3 s, ETA 0:41"),
        ({"target": None}, "accuracy 0.9722, 1.3 s, ETA 0:41"),
        ({"target": None, "final": {"train_loss": 0.1}}, "loss 0.1, 1.3 s, ETA 0:41"),
        ({"target": {"value": 0.99, "reached": False}}, "target 0.99 not reached, accuracy 0.9722, 1.3 s, ETA 0:41"),
        ({"reused": True, "target": None}, "accuracy 0.9722, reused, 1.3 s, ETA 0:41"),
        ({"status": "diverged"}, "DIVERGED at step 160, 1.3 s, ETA 0:41"),
        ({"status": "failed", "error": "ValueError: no"}, "FAILED: ValueError: no"),
        ({"status": "failed", "error": "died", "seconds": None, "target": None, "final": {}}, "FAILED: died"),
    ],
)
def test_line_of_a_trial_that_ended(changes: dict[str, Any], words: str) -> None:
    assert ended_line(a_result(**changes), a_status()) == f"[12/24] sgd batch 128 seed 1: {words}"


def test_elsewhere_than_on_a_terminal_one_plain_line_per_trial() -> None:
    console = plain()
    with Progress(console) as progress:
        progress.update(a_status())
        progress.ended(a_result(arm="a" * 100), a_status())
        progress.ended(a_result(status="failed", error="ValueError: no"), a_status())
    lines = output(console).splitlines()
    assert [line[:8] for line in lines] == ["[12/24] "] * 2
    assert "\x1b" not in output(console)


def test_terminal_has_a_live_view_and_failures_in_red_at_once() -> None:
    console = terminal()
    with Progress(console) as progress:
        progress.update(a_status())
        assert "11 of 24 trials done" in output(console)
        progress.ended(a_result(), a_status())
        assert "at step 140" not in output(console)
        progress.ended(a_result(status="failed", error="ValueError: no"), a_status())
        assert "\x1b[31m[12/24] sgd batch 128 seed 1: FAILED: ValueError: no" in output(console)


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = terminal()
    with Progress(console) as progress:
        progress.ended(a_result(status="failed", error="no"), a_status())
    assert "FAILED" in output(console) and "\x1b[31m" not in output(console)


@pytest.mark.parametrize("console", [plain(), terminal()])
def test_nothing_reaches_the_driver(console: Console) -> None:
    with Progress(console) as progress:
        progress.update({})
        progress.ended({}, {})
        console.file.close()
        progress.update(a_status())
        progress.ended(a_result(), a_status())


def test_status_in_words_and_as_json(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = a_status(state="done", exit_code=0, running=[])
    write_json(study / "status.json", status)
    assert show_status(study, watch=False, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == status
    assert show_status(study, watch=False, as_json=False) == 0
    assert "quick  done  11 of 24" in capsys.readouterr().out


def test_driver_that_is_gone(study: Path, gone: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(study / "status.json", a_status(pid=gone))
    assert show_status(study, watch=True, as_json=False) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "interrupted" in words and "run the same command again to resume" in words


def test_driver_on_another_host_or_alive_is_not_taken_for_gone(study: Path, gone: int) -> None:
    write_json(study / "status.json", a_status(pid=gone, host="elsewhere"))
    assert read_status(study)["state"] == "running"
    write_json(study / "status.json", a_status())
    assert read_status(study)["state"] == "running"


def test_process_that_only_has_the_pid_of_the_driver(study: Path) -> None:
    write_json(study / "status.json", a_status(updated=1e9))
    assert read_status(study)["state"] == "interrupted"


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("quikc", None, "quikc: no such directory; did you mean"),
        ("else", None, "else: no such directory; expected the directory of a study"),
        ("empty", None, "empty is not a study: it has no status.json"),
        ("quick/status.json", None, "no such directory"),
        ("quick", "{", "status.json: not JSON"),
        ("quick", "{}", "status.json: not the status of a study"),
    ],
)
def test_what_is_no_study_is_one_clear_line(
    study: Path, capsys: pytest.CaptureFixture[str], path: str, content: str | None, message: str, watch: bool
) -> None:
    (study.parent / "empty").mkdir()
    (study / "status.json").write_text(content or json.dumps(a_status()))
    assert show_status(study.parent / path, watch=watch, as_json=False) == 2
    captured = capsys.readouterr()
    assert captured.out.strip() == "" and message in captured.err and captured.err.count("\n") == 1


def test_watch_follows_until_the_end_and_never_sees_a_part(study: Path) -> None:
    write_json(study / "status.json", a_status(trials=a_status()["trials"] | {"done": 0}))

    def drive() -> None:
        for done in range(200):
            write_json(study / "status.json", a_status(trials=a_status()["trials"] | {"done": done}))
        write_json(study / "status.json", a_status(state="done", running=[]))

    driver = threading.Thread(target=drive)
    driver.start()
    seen = list(follow(study, poll=0.001))
    driver.join()
    assert [s["state"] for s in seen] == ["running"] * (len(seen) - 1) + ["done"]
    done = [s["trials"]["done"] for s in seen[:-1]]
    assert done == sorted(done) and len(done) > 5
