"""A trial goes on with another number of workers: the same trial, the same examples in the same order, the same loss."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from orchestrator.recipe import expand, load
from orchestrator.run_trial import Assignment, run_trial
from orchestrator.trial import Trial
from orchestrator.workloads import fingerprint
from strategies.contract import Clock
from tests.workers import run_workers

RECIPE = """
study: elastic
workload: {data: digits, model: {mlp: {width: 16, depth: 2}}}
cluster: {workers: 2}
base: {epochs: 2, batch: 64, rate: {peak: 0.1, decay: cosine}}
precision: fp32
checkpoint: {seconds: 0}
log_steps: 5
"""
STEPS, BATCH, STOP, SAVED = 45, 64, 23, 20  # checkpoints are written at rows: steps 20 and 22 among them
ROUNDING = 1e-6


def trial_of(folder: Path, workers: int) -> Trial:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (trial,) = expand(load(folder / "recipe.yaml", [f"cluster.workers={workers}"]), fingerprint, "fp32")
    return trial


Seen = dict[int, tuple[int, str]]  # position in the stream -> step, hash of the example


def train_until(worker: Any, trial: Trial, folder: Path, stop: int | None) -> Seen:
    """One rank of a gang that trains the trial, but is gone when step `stop` begins; -> what it trained on."""
    from orchestrator.trainer import PhaseRun

    seen: Seen = {}
    step, mapped = PhaseRun._step, PhaseRun._mapped

    def watched_step(run: PhaseRun) -> None:
        if run.progress.steps == stop:
            raise InterruptedError
        step(run)

    def watched_batch(run: PhaseRun, clock: Clock, start: int, end: int) -> Any:
        batch = mapped(run, clock, start, end)
        for position, x in zip(range(start, end), batch.x, strict=True):
            seen[position] = (run.progress.steps, hashlib.sha256(x.numpy().tobytes()).hexdigest())
        return batch

    PhaseRun._step, PhaseRun._mapped = watched_step, watched_batch  # type: ignore[method-assign,assignment]
    with contextlib.suppress(InterruptedError):
        run_trial(worker, Assignment(trial, folder / trial.id, folder / "phases"))
    return seen


def trained(folder: Path, workers: int, stop: int | None = None) -> Seen:
    parts = run_workers(train_until, workers, trial_of(folder, workers), folder, stop)
    together = {position: told for part in parts for position, told in part.items()}
    assert len(together) == sum(map(len, parts)), "two ranks trained on the same position"
    return dict(sorted(together.items()))


def rows(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights(folder: Path) -> dict[str, np.ndarray]:
    (file,) = folder.glob("phases/*/weights.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, trained(folder, 2)


@pytest.mark.parametrize("workers", [1, 3, 4])
def test_two_workers_then_another_number(tmp_path: Path, unbroken: tuple[Path, Seen], workers: int) -> None:
    reference, order = unbroken
    assert trial_of(tmp_path, workers).id == trial_of(tmp_path, 2).id
    assert list(order) == list(range(STEPS * BATCH))
    before = trained(tmp_path, 2, stop=STOP)
    after = trained(tmp_path, workers)
    resumed = min(step for step, _ in after.values())
    assert SAVED <= resumed <= STOP and len(before) == STOP * BATCH
    assert after == {position: told for position, told in order.items() if told[0] >= resumed}
    assert before == {position: told for position, told in order.items() if told[0] < STOP}
    one, other = rows(tmp_path), rows(reference)
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for name in ("train_loss", "test_loss"):
        values = [[row[name] for row in rows if name in row] for rows in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=0, abs=ROUNDING)
    left, right = weights(tmp_path), weights(reference)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=ROUNDING)
