from __future__ import annotations

import http.server
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import wandb_mirror
from orchestrator.files import append_line, open_lines, write_atomic, write_json
from orchestrator.recipe.schema import Wandb
from tests.waiting import at_once, until
from tests.wandb_file import Run, items, read

pytest.importorskip("wandb")
pytestmark = pytest.mark.timeout(120)
ROWS = 40


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("WANDB_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("BIGBATCH_NO_TRACKING", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "quickstart"
    path.mkdir()
    return path


@pytest.fixture
def start(study: Path) -> Iterator[Callable[..., wandb_mirror.Mirror]]:
    mirrors: list[wandb_mirror.Mirror] = []

    def started(**options: Any) -> wandb_mirror.Mirror:
        mirror = wandb_mirror.start(study, Wandb(**options))
        assert mirror
        mirrors.append(mirror)
        return mirror

    yield started
    for mirror in mirrors:
        mirror.stop(patience=0)


def write_config(study: Path, trial: str, seed: int = 0) -> Path:
    path = study / "trials" / trial
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "arm": "sgd",
        "seed": seed,
        "point": {},
        "base": {"batch": 64, "steps": None},
        "data": "npz://me:pw@host/x",
    }
    write_json(path / "config.json", config)
    return path


def write_rows(trial: Path, steps: range, seconds: float = 0.01) -> None:
    with open_lines(trial / "metrics.jsonl") as file:
        for n in steps:
            append_line(
                file, {"step": n, "phase": 0, "seconds": n * seconds, "train_loss": 1 / n, "rate": float("nan")}
            )


def write_result(trial: Path, status: str = "done", steps: int = ROWS) -> None:
    target = {"metric": "test_accuracy", "value": 0.9, "reached": True, "step": 7}
    parts = {
        "final": {"test_accuracy": 0.95},
        "best": {"test_accuracy": 0.96},
        "target": target,
        "seconds": {"train": 1.5},
    }
    write_json(trial / "result.json", {"status": status, "steps": steps, "error": None} | parts)


def whole_trial(study: Path, trial: str, status: str = "done") -> None:
    path = write_config(study, trial)
    write_rows(path, range(1, ROWS + 1))
    write_result(path, status)


def runs(study: Path) -> dict[str, list[Run]]:
    """All runs on disk by trial."""
    found: dict[str, list[Run]] = {}
    for path in sorted(study.glob("wandb/*/*.wandb")):
        found.setdefault(path.stem.rsplit("-", 1)[1], []).append(read(path))
    return found


def steps(fragments: list[Run]) -> list[int]:
    return [row["step"] for run in fragments for row in run.rows]


def test_every_row_once_with_config_summary_and_exit_code(
    study: Path, start: Callable[..., wandb_mirror.Mirror]
) -> None:
    mirror = start(project="mine")
    for trial, status in (("aaa", "done"), ("bbb", "diverged"), ("ccc", "pruned")):
        whole_trial(study, trial, status)
    mirror.stop()
    found = runs(study)
    assert sorted(found) == ["aaa", "bbb", "ccc"]
    assert all(steps(fragments) == list(range(1, ROWS + 1)) for fragments in found.values())
    assert [found[t][0].exit_code for t in ("aaa", "bbb", "ccc")] == [0, 1, 0]
    run = found["aaa"][0]
    assert run.rows[4] | {"train_loss": 0.2, "phase": 0, "step": 5, "_step": 5} == run.rows[4]
    assert (run.record.project, run.record.run_group, run.record.job_type) == ("mine", "quickstart", "sgd")
    assert run.record.display_name == "sgd b=64 s=0"
    assert run.summary["target/step"] == 7 and run.summary["final/test_accuracy"] == 0.95
    assert len(set(run.summary) | set(run.rows[0])) <= 60


def test_config_is_logged_once_and_holds_no_secret_null_or_empty_map(
    study: Path, start: Callable[..., wandb_mirror.Mirror]
) -> None:
    whole_trial(study, "aaa")
    start().stop()
    run = runs(study)["aaa"][0]
    assert run.configs == 1
    config = {k: v for k, v in items(run.record.config.update).items() if k != "_wandb"}
    assert config == {"arm": "sgd", "seed": 0, "base": {"batch": 64}, "data": "npz://***@host/x"}


def test_killed_and_started_again_each_step_once(study: Path, start: Callable[..., wandb_mirror.Mirror]) -> None:
    whole_trial(study, "aaa")
    middle = write_config(study, "bbb")
    write_rows(middle, range(1, 21))
    mirror = start()
    until(lambda: (study / "trials/aaa/wandb.json").exists() and len(steps(runs(study).get("bbb", []))) == 20)
    mirror.process.kill()
    mirror.process.wait()
    write_rows(middle, range(21, ROWS + 1))
    write_result(middle)
    whole_trial(study, "ccc")
    start().stop()
    found = runs(study)
    assert sorted(found) == ["aaa", "bbb", "ccc"]
    for fragments in found.values():
        assert Counter(steps(fragments)) == Counter(range(1, ROWS + 1))
        assert fragments[-1].exit_code == 0


def test_rows_reach_the_disk_within_seconds_and_a_resumed_trial_never_rewinds(
    study: Path, start: Callable[..., wandb_mirror.Mirror]
) -> None:
    trial = write_config(study, "aaa")
    write_rows(trial, range(1, 21))
    mirror = start()
    until(lambda: "aaa" in runs(study))
    until(lambda: len(steps(runs(study)["aaa"])) == 20, 10)  # W&B itself takes 15
    kept = (trial / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:10]
    write_atomic(trial / "metrics.jsonl", b"".join(kept))
    write_rows(trial, range(11, ROWS + 1), seconds=0.02)
    write_result(trial)
    mirror.stop()
    assert steps(runs(study)["aaa"]) == list(range(1, ROWS + 1))


def test_interrupted_study_is_one_whole_run_after_it_went_on(
    study: Path, start: Callable[..., wandb_mirror.Mirror]
) -> None:
    trial = write_config(study, "aaa")
    write_rows(trial, range(1, 21))
    start().stop()
    assert [(len(r.rows), r.exit_code) for r in runs(study)["aaa"]] == [(20, 1)]
    write_rows(trial, range(21, ROWS + 1))
    write_result(trial)
    start().stop()
    assert [(len(r.rows), r.exit_code) for r in runs(study)["aaa"]] == [(ROWS, 0)]


def test_second_study_run_leaves_complete_runs_alone(study: Path, start: Callable[..., wandb_mirror.Mirror]) -> None:
    whole_trial(study, "aaa")
    start().stop()
    (path,) = study.glob("wandb/*/*.wandb")
    before = path.read_bytes()
    start().stop()
    assert list(study.glob("wandb/*/*.wandb")) == [path] and path.read_bytes() == before


def test_ends_by_itself_when_the_driver_is_gone(study: Path, start: Callable[..., wandb_mirror.Mirror]) -> None:
    whole_trial(study, "aaa")
    mirror = start()
    assert mirror.process.stdin
    mirror.process.stdin.close()  # as the kernel does for a driver that was killed
    assert mirror.process.wait(30) == 0
    assert steps(runs(study)["aaa"]) == list(range(1, ROWS + 1))


def test_damaged_trial_is_told_in_the_log_and_keeps_no_other_back(
    study: Path, start: Callable[..., wandb_mirror.Mirror]
) -> None:
    whole_trial(study, "aaa")
    (study / "trials/aaa/metrics.jsonl").write_text("{\n{}\n")
    whole_trial(study, "bbb")
    start().stop()
    assert "metrics.jsonl, line 1: expected a JSON object" in (study / "wandb_mirror.log").read_text()
    assert steps(runs(study)["bbb"]) == list(range(1, ROWS + 1))


@pytest.mark.parametrize("key", ["0" * 40, None])
def test_unreachable_server_costs_seconds_and_leaves_an_offline_run(
    study: Path, start: Callable[..., wandb_mirror.Mirror], monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    whole_trial(study, "aaa")
    with at_once(12):  # 3 s for an answer, and offline takes up to 3; asking W&B itself takes 15
        start(mode="online").stop()
    assert steps(runs(study)["aaa"]) == list(range(1, ROWS + 1))
    why = "no answer from 127.0.0.1" if key else "no API key for 127.0.0.1"
    assert why in (study / "wandb_mirror.log").read_text()


class Refusal(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_error(401)

    def log_message(self, *_: object) -> None:
        """Silent."""


def test_server_that_refuses_leaves_whole_offline_runs(
    study: Path, start: Callable[..., wandb_mirror.Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        whole_trial(study, "aaa")
        whole_trial(study, "bbb")
        start(mode="online").stop()
        server.shutdown()
    found = runs(study)
    assert {trial: [(len(r.rows), r.exit_code) for r in fragments] for trial, fragments in found.items()} == {
        "aaa": [(ROWS, 0)],
        "bbb": [(ROWS, 0)],
    }


def test_no_secret_of_the_environment_is_kept(
    study: Path, start: Callable[..., wandb_mirror.Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "c0ffee" * 6 + "beef"
    monkeypatch.setenv("WANDB_API_KEY", canary)
    monkeypatch.setenv("HF_TOKEN", canary)
    whole_trial(study, "aaa")
    start().stop()
    files = [p for p in study.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    assert [p for p in files if canary.encode() in p.read_bytes()] == []


def test_without_wandb_a_note_and_nothing_else(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    left_behind = tmp_path / "cwd" / "wandb"  # W&B leaves such directories; they are no installation
    left_behind.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(left_behind.parent)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert importlib.util.find_spec("wandb") is not None
    assert wandb_mirror.start(study, Wandb()) is None
    assert capsys.readouterr().err == wandb_mirror.NOT_INSTALLED + "\n"
    assert not (study / "wandb").exists()


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "disabled"), ("BIGBATCH_NO_TRACKING", "1")])
def test_switched_off(study: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert wandb_mirror.start(study, Wandb()) is None


def test_training_comes_first(study: Path, start: Callable[..., wandb_mirror.Mirror]) -> None:
    """Niceness alone would count within the copier's own session only."""
    pid = start().process.pid
    until(lambda: psutil.Process(pid).nice() == min(19, os.nice(0) + wandb_mirror.NICENESS))
    group = Path(f"/proc/{pid}/autogroup")
    if group.exists() and "autogroup" in group.read_text():
        until(lambda: group.read_text().split()[-1] == str(wandb_mirror.NICENESS))


def test_copier_that_hangs_is_ended(study: Path, start: Callable[..., wandb_mirror.Mirror]) -> None:
    mirror = start()
    os.kill(mirror.process.pid, signal.SIGSTOP)
    with at_once():
        mirror.stop(patience=0.2)
    assert mirror.process.poll() is not None


def test_imports_neither_torch_nor_ray_nor_wandb() -> None:
    code = "import sys, json, orchestrator.wandb_mirror; print(json.dumps([m for m in sys.modules if '.' not in m]))"
    loaded = json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout
    )
    assert {"torch", "ray", "wandb"}.isdisjoint(loaded)
