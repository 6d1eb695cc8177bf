"""Gangs of torchrun's ranks, as a program of their own and as a user's study: faults, signals, and who tells what."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults import alive
from tests.waiting import AT_ONCE, until

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

PROGRAM = """
import json, os, sys, time
import torch
from cluster import torchrun
from cluster.tasks import Failed, Task

def add_up(worker, argument):
    return worker.sum_(torch.tensor(argument * (worker.rank + 1))).item()

def threads(worker, argument):
    return int(worker.sum_(torch.tensor(torch.get_num_threads())))

def fail_on_one(worker, argument):
    if worker.rank == 1:
        raise ValueError("bad label 11")
    worker.sum_(torch.zeros(1))

def fail_on_zero(worker, argument):
    if worker.rank == 0:
        raise ValueError("bad label 12")
    worker.sum_(torch.zeros(1))

def run(gang, function, argument=None, threads=1):
    gang.start(Task(function, argument, "ddp", threads=threads))
    began, outcome = time.monotonic(), gang.poll(1)
    failed = isinstance(outcome, Failed)
    told = [outcome.rank, outcome.kind, outcome.message, outcome.where] if failed else outcome.value
    print(json.dumps([function.__name__, told, time.monotonic() - began]), flush=True)
    if failed:
        gang.close()
        gang = torchrun.TorchrunGang(2, timeout=60)
    return gang

def main():
    gang = torchrun.TorchrunGang(2, timeout=60)
    gang = run(gang, add_up, 1.0)
    gang = run(gang, threads, threads=2)
    for _ in range(2):
        gang = run(gang, fail_on_one)
        gang = run(gang, add_up, 2.0)
        gang = run(gang, fail_on_zero)
        gang = run(gang, add_up, 3.0)
    gang.close()

if __name__ == "__main__":
    import program  # so that functions are found by their module's name
    if torchrun.following():
        sys.exit(torchrun.follow())
    with torchrun.leading():
        program.main()
"""

RECIPE = """
study: long
workload: {data: digits, model: {mlp: {width: 32, depth: 2}}, target: {test_accuracy: 0.9}}
cluster: {workers: 2, timeout: 30}
base: {epochs: EPOCHS, batch: 16, rate: {peak: 0.05, decay: cosine}}
seeds: 1
precision: fp32
checkpoint: {seconds: 0}
log_steps: 20
"""

NETWORK = """
import os
from torch import nn

def build(inputs, classes):
    if os.environ["RANK"] == "1":
        raise ValueError("bad label 11")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
"""


def program(folder: Path) -> list[list[Any]]:
    (folder / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(folder)])
    done = subprocess.run(
        [*TORCHRUN, str(folder / "program.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_failed_task_leaves_a_working_gang(tmp_path: Path) -> None:
    """The rank that waits in a collective is freed at once, the culprit is named, and the next task works."""
    told = program(tmp_path)
    lines = PROGRAM.splitlines()
    one = [1, "ValueError", "bad label 11", f"program.py:{lines.index(lines_with(lines, 'label 11')) + 1}"]
    zero = [0, "ValueError", "bad label 12", f"program.py:{lines.index(lines_with(lines, 'label 12')) + 1}"]
    faults = [["fail_on_one", one], ["add_up", 6.0], ["fail_on_zero", zero], ["add_up", 9.0]]
    assert [entry[:2] for entry in told] == [["add_up", 3.0], ["threads", 4], *faults, *faults]
    assert max(seconds for name, _, seconds in told if "fail" in name) < AT_ONCE


def lines_with(lines: list[str], words: str) -> str:
    return next(line for line in lines if words in line)


# ---------------------------------------------------------------------------------------------------------- studies


class Running:
    """torchrun in a process group of its own."""

    def __init__(self, folder: Path, *words: str, epochs: int = 15, runs: str = "runs"):
        recipe = folder / "long.yaml"
        recipe.write_text(RECIPE.replace("EPOCHS", str(epochs)))
        self.study = folder / runs / "long"
        command = [*TORCHRUN, "-m", "orchestrator", "run", str(recipe), "-o", str(folder / runs), *words]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, cwd=folder, start_new_session=True
        )

    def ranks(self) -> list[psutil.Process]:
        """Rank 0 first."""
        children = psutil.Process(self.process.pid).children()
        return sorted(children, key=lambda p: int(p.environ().get("RANK", -1)))

    def wait_for_step(self, step: int) -> None:
        until(lambda: any(row["step"] >= step for row in self.rows()))

    def rows(self) -> list[dict[str, Any]]:
        files = self.study.glob("trials/*/metrics.jsonl")
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [{k: v for k, v in row.items() if "second" not in k} for row in rows]

    def end(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=100)
        return self.process.returncode, err


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("unbroken"))
    code, err = running.end()
    assert code == 0, err
    yield running


INTERRUPTIONS: list[tuple[str, int]] = [
    ("torchrun", signal.SIGTERM), ("torchrun", signal.SIGKILL), ("all", signal.SIGINT), ("rank 0", signal.SIGTERM),
    ("rank 0", signal.SIGKILL), ("rank 1", signal.SIGKILL),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("who", "sign"), INTERRUPTIONS)
def test_interrupted(tmp_path: Path, unbroken: Running, who: str, sign: int) -> None:
    """All ranks end, and the same command goes on to the same rows."""
    first = Running(tmp_path)
    first.wait_for_step(200)
    ranks = first.ranks()
    assert len(ranks) == 2
    if who == "all":
        os.killpg(first.process.pid, sign)  # as Ctrl-C does
    else:
        victims = {"torchrun": psutil.Process(first.process.pid), "rank 0": ranks[0], "rank 1": ranks[1]}
        victims[who].send_signal(sign)
    until(lambda: not any(map(alive, ranks)), AT_ONCE)
    code, err = first.end()
    assert code != 0
    if (who, sign) != ("rank 0", signal.SIGKILL):
        assert "the same command goes on" in err
        assert json.loads((first.study / "status.json").read_text())["state"] == "interrupted"
    if who == "rank 1":
        assert "SIGKILL" in err.rpartition("Root Cause")[2] and "rank      : 1" in err.rpartition("Root Cause")[2]
    second = Running(tmp_path)
    code, err = second.end()
    assert code == 0, err
    assert second.rows() == unbroken.rows() != []


@pytest.mark.slow
def test_torchrun_starts_lost_ranks_again(tmp_path: Path, unbroken: Running) -> None:
    """With --max-restarts, a killed rank costs no second command."""
    TORCHRUN.insert(4, "--max-restarts=2")
    try:
        running = Running(tmp_path)
    finally:
        TORCHRUN.pop(4)
    running.wait_for_step(200)
    running.ranks()[1].kill()
    code, err = running.end()
    assert code == 0, err
    assert running.rows() == unbroken.rows()


@pytest.mark.slow
def test_a_finished_study_trains_nothing(unbroken: Running) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.study.rglob("*") if path.name != ".lock"}
    code, err = Running(unbroken.study.parent.parent).end()
    assert code == 0 and "all 1 trials are done" in err
    assert {path: path.stat().st_mtime_ns for path in before}.items() >= {
        path: time for path, time in before.items() if "trials" in path.parts
    }.items()


def test_the_last_lines_name_the_root_cause(tmp_path: Path) -> None:
    """An error on rank 1 fails its trial; the one after it is trained; torchrun's own last words are the cause."""
    (tmp_path / "mynet.py").write_text(NETWORK)
    models = "grid={workload.model: [{import: 'mynet:build'}, {mlp: {width: 32, depth: 2}}]}"
    running = Running(tmp_path, "--allow-code", "--set", models, epochs=1)
    code, err = running.end()
    assert code == 1
    results = [json.loads(path.read_text()) for path in running.study.glob("trials/*/result.json")]
    assert sorted(result["status"] for result in results) == ["done", "failed"]
    failed = next(result["trial"] for result in results if result["status"] == "failed")
    cause = err.rpartition("traceback : ")[2]
    assert f"trial {failed}: rank 1 on " in cause and "ValueError: bad label 11 (mynet.py:7)" in cause
    log = running.study / "trials" / failed / "logs" / "rank_1.log"
    assert str(log) in cause and "bad label 11" in log.read_text()


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    code, err = Running(tmp_path, "--set", "cluster.workers=1").end()
    told = "torchrun started 2 processes, but cluster.workers is 1: use --nproc-per-node 1, or set cluster.workers: 2"
    assert code == 1 and told in err and "exitcode  : 2" in err


def test_without_torchrun_the_command_is_told(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text(RECIPE.replace("EPOCHS", "1"))
    words = ["run", "long.yaml", "--set", "cluster.launcher=torchrun"]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *words], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "torchrun --standalone --nproc-per-node 2 -m orchestrator run RECIPE" in done.stderr
