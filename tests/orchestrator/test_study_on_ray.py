"""The command `bigbatch run` as a user runs it, on two Ray workers: kills, signals, a second driver, a warm gang."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from tests.faults import alive
from tests.waiting import AT_ONCE, at_once, until

pytest.importorskip("ray", reason="Ray is not installed")

RECIPE = """
study: NAME
workload: {data: digits, model: {mlp: {width: 32, depth: 2}}, target: {test_accuracy: 0.9}}
cluster: CLUSTER
base: {epochs: EPOCHS, batch: 16, rate: {peak: 0.05, decay: cosine}}
seeds: SEEDS
checkpoint: {seconds: 0}
log_steps: 20
tracking: {wandb: {mode: offline}}
"""


class Running:
    """A driver in a process of its own."""

    def __init__(
        self,
        folder: Path,
        name: str = "long",
        epochs: int = 15,
        seeds: str = "1",
        runs: str = "runs",
        cluster: str = "{workers: 2, timeout: 30}",
        text: str = RECIPE,
        env: dict[str, str] | None = None,
        words: Sequence[str] = (),
    ):
        folder.mkdir(exist_ok=True)
        recipe = folder / f"{name}.yaml"
        text = text.replace("NAME", name).replace("EPOCHS", str(epochs)).replace("SEEDS", seeds)
        recipe.write_text(text.replace("CLUSTER", cluster))
        self.study = folder / runs / name
        self.phases = folder / runs / ".phases"
        command = [sys.executable, "-m", "orchestrator", "run", str(recipe), "-o", str(folder / runs), *words]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | (env or {}), **pipes)

    def rows(self) -> list[dict[str, Any]]:
        files = list(self.study.glob("trials/*/metrics.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def wait_for_step(self, step: int) -> None:
        until(lambda: any(row["step"] >= step for row in self.rows()))

    def ranks(self) -> list[psutil.Process]:
        """The processes of the gang, rank 0 first."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return sorted((p for p in children if "Rank" in " ".join(p.cmdline())), key=lambda p: p.create_time())

    def end(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=120)
        return self.process.returncode, err

    def results(self) -> dict[str, dict[str, Any]]:
        files = self.study.glob("trials/*/result.json")
        return {r["trial"]: r for r in (json.loads(file.read_text()) for file in files)}

    def weights(self) -> dict[str, bytes]:
        """Bytes of all final weights, by phase and name."""
        files = self.phases.glob("*/weights.safetensors")
        return {f"{file.parent.name}/{k}": v.tobytes() for file in files for k, v in load_file(file).items()}

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.study / "journal.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("unbroken"))
    code, err = running.end()
    assert code == 0, err
    yield running


def test_killed_rank(tmp_path: Path, unbroken: Running) -> None:
    """kill -9 of a rank in mid-trial: a new gang goes on from the checkpoint, to the same weights bit for bit."""
    running = Running(tmp_path)
    running.wait_for_step(300)
    victims = running.ranks()
    assert len(victims) == 2
    victims[1].kill()
    until(lambda: not victims[0].is_running(), AT_ONCE)
    code, err = running.end()
    assert code == 0, err
    assert "was lost" in err and len(running.events("worker_lost")) == 1
    assert [e["attempt"] for e in running.events("trial_started")] == [1, 2]
    assert running.weights() == unbroken.weights() != {}
    assert without_seconds(running.rows()) == without_seconds(unbroken.rows())


@pytest.mark.parametrize(
    ("sign", "expected"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow), (signal.SIGKILL, -9)],
)
def test_interrupted_driver(tmp_path: Path, unbroken: Running, sign: int, expected: int) -> None:
    """The same command again goes on, to the same weights; no process is left behind; no row is lost or doubled."""
    first = Running(tmp_path)
    first.wait_for_step(300)
    ours = psutil.Process(first.process.pid).children(recursive=True)
    first.process.send_signal(sign)
    code, err = first.end()
    assert code == expected, err
    if sign != signal.SIGKILL:
        assert "the same command goes on" in err
        assert json.loads((first.study / "status.json").read_text())["state"] == "interrupted"
    until(lambda: not any(map(alive, ours)), AT_ONCE)
    second = Running(tmp_path)
    code, err = second.end()
    assert code == 0, err
    assert second.weights() == unbroken.weights()
    assert without_seconds(second.rows()) == without_seconds(unbroken.rows())
    assert second.results().keys() == unbroken.results().keys()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_all_processes(tmp_path: Path, sign: int) -> None:
    """As Slurm, systemd and `timeout` send it: the driver's own cluster stays until the study has ended in order."""
    running = Running(tmp_path, epochs=1000)
    running.wait_for_step(100)
    driver = psutil.Process(running.process.pid)
    everyone = [driver, *driver.children(recursive=True)]
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):  # W&B's own process goes with the one that copies
            process.send_signal(sign)
    with at_once():
        code, err = running.end()
    assert code == 75, err
    assert json.loads((running.study / "status.json").read_text())["state"] == "interrupted"
    until(lambda: not any(map(alive, everyone[1:])), AT_ONCE)


@pytest.mark.slow  # tests/cluster/test_gang.py has the same of tasks
def test_cold_and_fifth_on_a_warm_gang(tmp_path: Path) -> None:
    """Five trials on one gang; then the fifth alone, cold. Bit-identical, and the gaps are short."""
    warm = Running(tmp_path, "warm", epochs=2, seeds="[0, 1, 2, 3, 4]")
    code, err = warm.end()
    assert code == 0, err
    cold = Running(tmp_path, "cold", epochs=2, seeds="[4]", runs="elsewhere")
    assert cold.end()[0] == 0
    (trial,) = cold.results()
    fifth = warm.study / "trials" / trial / "metrics.jsonl"
    assert without_seconds([json.loads(line) for line in fifth.read_text().splitlines()]) == without_seconds(
        cold.rows()
    )
    assert cold.weights().items() <= warm.weights().items()
    status = json.loads((warm.study / "status.json").read_text())
    print(f"median gap {status['gap_seconds']:.4f} s, first trial after {status['startup_seconds']:.1f} s")
    assert status["gap_seconds"] < 0.5


def test_finished_study_starts_no_worker(tmp_path: Path, unbroken: Running) -> None:
    folder = unbroken.study.parent.parent
    again = Running(folder, env={"RAY_ADDRESS": "127.0.0.1:1"})  # where no cluster is
    code, err = again.end()
    assert code == 0 and "all 1 trials are done" in err
    assert len(again.events("trial_started")) == 1


def test_second_driver_leaves(tmp_path: Path) -> None:
    first = Running(tmp_path, epochs=10)
    until(lambda: (first.study / "journal.jsonl").exists())
    code, err = Running(tmp_path, epochs=10).end()
    assert code == 75 and f"pid {first.process.pid}" in err
    assert first.end()[0] == 0
    assert len(first.events("trial_started")) == 1


def test_nothing_listens_beyond_loopback(tmp_path: Path) -> None:
    """The cluster that we start serves this machine alone."""
    running = Running(tmp_path, epochs=10)
    running.wait_for_step(1)
    family = [psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children(recursive=True)]
    listening = [c.laddr.ip for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert running.end()[0] == 0
    assert listening and all(ip.removeprefix("::ffff:") in ("127.0.0.1", "::1") for ip in listening), set(listening)


def test_gangs_side_by_side(tmp_path: Path) -> None:
    """Two gangs of one worker each share the trials of a study, and give what one would."""
    both = Running(tmp_path, "both", epochs=2, seeds="4", cluster="{workers: 1, gangs: 2}")
    alone = Running(tmp_path, "alone", epochs=2, seeds="4", runs="elsewhere", cluster="{launcher: solo}")
    for running in (both, alone):
        code, err = running.end()
        assert code == 0, err
    started = both.events("trial_started")
    assert {e["gang"] for e in started} == {"gang0", "gang1"}
    assert started[1]["time"] < both.events("trial_ended")[0]["time"]
    assert both.weights() == alone.weights()
