"""One recipe, five ways, one result: alone, a gang, torchrun, Ray Train, a Ray job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("ray.job_submission", reason="Ray's Jobs client is not installed")

from tests.orchestrator.test_submit import AS_CLIENT, head  # noqa: F401

RECIPE = """
study: parity
workload: {data: digits, model: {mlp: {width: 32, depth: 2}}, target: {test_accuracy: 0.9}}
cluster: {workers: 2, threads: 1, timeout: 30}
base: {epochs: 1, batch: 32, rate: {peak: 0.05, decay: cosine}}
seeds: 2
precision: fp32
log_steps: 5
"""
BIGBATCH = [sys.executable, "-m", "orchestrator"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
LIMIT = 120  # seconds for a study
ROUNDING = 1e-5  # of float32, for the sum over two workers in another order


@dataclass(frozen=True)
class Ended:
    """A study on file."""

    runs: Path

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Of each trial, without times."""
        read = {file.parent.name: file.read_text().splitlines() for file in self.runs.glob("parity/trials/*/*.jsonl")}
        return {
            trial: [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]
            for trial, lines in read.items()
        }

    def weights(self) -> dict[str, np.ndarray]:
        files = self.runs.glob(".phases/*/weights.safetensors")
        return {f"{file.parent.name}/{name}": array for file in files for name, array in load_file(file).items()}

    def layout(self) -> set[str]:
        """All files but the logs of further ranks."""
        files = {str(path.relative_to(self.runs)) for path in self.runs.rglob("*") if path.is_file()}
        return {file for file in files if not file.endswith("rank_1.log")}

    def threads(self) -> set[int]:
        return {json.loads(file.read_text())["threads"] for file in self.runs.glob("parity/trials/*/result.json")}


Runner = Callable[..., Ended]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Runs the recipe, each way once."""

    @cache
    def way(name: str, *words: str, command: tuple[str, ...] = tuple(BIGBATCH), **variables: str) -> Ended:
        folder = tmp_path_factory.mktemp(name)
        (folder / "parity.yaml").write_text(RECIPE)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | variables
        line = [*command, "run", "parity.yaml", "-o", str(folder / "runs"), *words]
        done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, cwd=folder, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return Ended(folder / "runs")

    return way


def assert_same(one: Ended, other: Ended) -> None:
    """Bit for bit."""
    assert one.rows() == other.rows()
    left, right = one.weights(), other.weights()
    assert left and left.keys() == right.keys()
    assert all(left[name].tobytes() == right[name].tobytes() for name in left)
    assert one.layout() == other.layout()


def test_gang(run: Runner) -> None:
    ended = run("gang")
    assert len(ended.rows()) == 2 and ended.threads() == {1}
    assert all(row["train_loss"] > 0 for rows in ended.rows().values() for row in rows)


def test_alone(run: Runner) -> None:
    """The same trials and steps; the numbers to within rounding."""
    alone, gang = run("alone", "--set", "cluster={launcher: solo}", "--set", "engine=solo"), run("gang")
    assert alone.layout() == gang.layout()
    assert alone.rows().keys() == gang.rows().keys()
    for trial, rows in alone.rows().items():
        for one, other in zip(rows, gang.rows()[trial], strict=True):
            assert one == pytest.approx(other, rel=ROUNDING)
    left, right = alone.weights(), gang.weights()
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=ROUNDING)


def test_torchrun(run: Runner) -> None:
    assert_same(run("torchrun", command=(*TORCHRUN, "orchestrator"), OMP_NUM_THREADS="2"), run("gang"))


@pytest.mark.slow
def test_ray_train(run: Runner) -> None:
    pytest.importorskip("pandas", reason="Ray Train is not installed")
    assert_same(run("ray_train", "--set", "cluster.launcher=ray_train"), run("gang"))


@pytest.mark.slow
def test_ray_job(run: Runner, head: str) -> None:  # noqa: F811
    """A plain `ray job submit`, which knows nothing of bigbatch."""
    submit = (str(Path(sys.executable).with_name("ray")), "job", "submit", "--working-dir", ".", "--", *BIGBATCH)
    assert_same(run("job", command=submit, RAY_API_SERVER_ADDRESS=head, **AS_CLIENT), run("gang"))
