"""Batch norm and another number of workers: what a worker normalises over is part of the trial's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from orchestrator.files import read_json, read_lines
from orchestrator.recipe import expand, load
from orchestrator.trial import Trial
from orchestrator.workloads import fingerprint
from tests.orchestrator.test_elastic import BATCH, SAVED, STEPS, STOP, Seen, train_until
from tests.orchestrator.test_study_on_ray import without_seconds
from tests.workers import run_workers

RECIPE = """
study: elastic
workload: {data: digits, model: {small_cnn: {width: 2, batch_norm: NORM}}}
cluster: {workers: 2}
base: {epochs: 2, batch: 64, rate: {peak: 0.1, decay: cosine}}
precision: fp64
checkpoint: {seconds: 0}
log_steps: 5
"""
EXACT = 1e-9  # of float64, for the sum over workers in another order
ALONE = ("cluster.workers=1", "base.micro_batch=32")  # in shares as of two workers


def trial_of(folder: Path, *sets: str, norm: bool = True) -> Trial:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE.replace("NORM", str(norm).lower()))
    (trial,) = expand(load(folder / "recipe.yaml", list(sets)), fingerprint, "fp32")
    return trial


def trained(folder: Path, *sets: str, stop: int | None = None) -> Seen:
    """What was trained on, by position."""
    trial = trial_of(folder, *sets)
    parts = run_workers(train_until, trial.cluster.workers, trial, folder, stop)
    return {position: told for part in parts for position, told in part.items()}


@pytest.mark.parametrize("workers", [1, 3, 4])
def test_another_number_of_workers_is_another_trial(tmp_path: Path, workers: int) -> None:
    ids = [{trial_of(tmp_path, f"cluster.workers={n}", norm=norm).id for n in (2, workers)} for norm in (True, False)]
    assert list(map(len, ids)) == [2, 1]


def test_the_same_shares_are_the_same_trial(tmp_path: Path) -> None:
    assert trial_of(tmp_path, *ALONE).id == trial_of(tmp_path).id != trial_of(tmp_path, "cluster.workers=1").id


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path, trial: str) -> dict[str, bytes]:
    """Those that a trial of one phase ended with."""
    (phase,) = read_json(folder / trial / "phases.json")
    return {name: w.tobytes() for name, w in load_file(folder / "phases" / phase / "weights.safetensors").items()}


def rows(folder: Path, trial: str) -> list[dict[str, Any]]:
    return without_seconds(read_lines(folder / trial / "metrics.jsonl"))


EIGHT = "base.batch=8"
CUT = [
    (("base.micro_batch=22",), ("cluster.workers=3",)),
    ((EIGHT, "cluster.workers=4"), (EIGHT, "cluster.workers=5")),
]


@pytest.mark.parametrize(("one", "other"), CUT)
def test_other_shares_are_another_trial(tmp_path: Path, one: tuple[str, ...], other: tuple[str, ...]) -> None:
    """2 workers in parts of 16 for 22 at most, and 3 of 22, 21, 21; 4 of 2, and 5 of 2, 2, 2, 1, 1."""
    assert trial_of(tmp_path, *one).id != trial_of(tmp_path, *other).id


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    trained(folder)
    return folder


@pytest.mark.slow
def test_the_other_trial_begins_anew_and_the_first_one_is_there_to_go_on(tmp_path: Path, unbroken: Path) -> None:
    first = trial_of(tmp_path).id
    trained(tmp_path, stop=STOP)
    before = contents(tmp_path / first)
    other = trained(tmp_path, "cluster.workers=1")
    assert sorted(other) == list(range(STEPS * BATCH))
    assert contents(tmp_path / first) == before
    trained(tmp_path)
    assert weights(tmp_path, first) == weights(unbroken, first)
    assert rows(tmp_path, first) == rows(unbroken, first)


@pytest.mark.slow
def test_the_same_shares_on_another_number_of_workers_go_on(tmp_path: Path, unbroken: Path) -> None:
    trained(tmp_path, stop=STOP)
    after = trained(tmp_path, *ALONE)
    assert SAVED <= min(step for step, _ in after.values()) <= STOP
    one, other = (rows(folder, trial_of(folder).id) for folder in (tmp_path, unbroken))
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for a, b in zip(one, other, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=0, abs=EXACT)
