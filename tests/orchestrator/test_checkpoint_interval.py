"""When checkpoints are due: the optimum of Young and Daly, and a bound that holds whatever a save costs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from cluster.engines import make_worker
from orchestrator.checkpoint_interval import OVERHEAD, SHARE, CheckpointInterval, best_interval, expected_cost
from orchestrator.run_trial import Assignment, run_trial
from tests.orchestrator.test_run_trial import RECIPE, trials


@given(cost=st.floats(1e-3, 1e3), mtbf=st.floats(1e2, 1e7))
def test_the_best_interval_loses_least(cost: float, mtbf: float) -> None:
    """Lost per second of work: a save per interval, and half an interval per failure."""
    lost = minimize_scalar(
        lambda log: cost / math.exp(log) + math.exp(log) / (2 * mtbf), bounds=(-15, 25), method="bounded"
    )
    assert best_interval(cost, mtbf) == pytest.approx(math.exp(lost.x), rel=1e-2)
    assert best_interval(cost, mtbf) == pytest.approx(math.sqrt(2 * cost * mtbf), rel=1e-12)


def walk(interval: CheckpointInterval, cost: float, steps: int, row: float = 0.1) -> list[float]:
    """Training seconds at which saves happen, rows being `row` seconds apart and each save costing `cost`."""
    saves: list[float] = []
    for trained in itertools.islice(itertools.count(row, row), steps):
        spent = cost * len(saves)
        if interval.due(trained - (saves[-1] if saves else 0.0), trained, spent, cost):
            saves.append(trained)
    return saves


@given(cost=st.floats(1e-4, 10), mtbf=st.floats(1, 1e5), row=st.floats(0.01, 10))
def test_saving_never_takes_more_than_its_share(cost: float, mtbf: float, row: float) -> None:
    """At every moment of the trial, not only in the long run."""
    for number, trained in enumerate(walk(CheckpointInterval(None, mtbf), cost, 500, row), 1):
        assert number * cost <= SHARE * trained * (1 + 1e-9)


def test_saves_are_as_far_apart_as_the_optimum_says() -> None:
    saves = walk(CheckpointInterval(None, 3600.0), 0.02, 5000)  # of 500 s; the optimum is 12 s
    gaps = [b - a for a, b in itertools.pairwise(saves)]
    assert len(saves) == 41 and all(gap == pytest.approx(12.0, abs=0.11) for gap in gaps)


def test_rarer_failures_make_rarer_saves() -> None:
    often, seldom = (len(walk(CheckpointInterval(None, mtbf), 0.02, 5000)) for mtbf in (900.0, 14400.0))
    assert often == pytest.approx(4 * seldom, rel=0.05)


def test_fixed_seconds_are_kept_whatever_they_cost() -> None:
    assert walk(CheckpointInterval(0.0, 3600.0), 100.0, 3) == pytest.approx([0.1, 0.2, 0.3])
    assert len(walk(CheckpointInterval(7.0, 3600.0), 100.0, 1000)) == 14


def test_the_first_cost_is_guessed_from_the_size() -> None:
    assert expected_cost(0) == OVERHEAD
    assert expected_cost(10**9) == pytest.approx(10 + OVERHEAD)


@pytest.mark.parametrize(("line", "saved"), [("{mtbf: 1e9}", False), ("{mtbf: 0.1}", True), ("{seconds: 0}", True)])
def test_a_recipe_sets_the_interval(tmp_path: Path, line: str, saved: bool) -> None:
    """Where failures are rare, a trial of a second ends before a save pays off; where they are frequent, it saves."""
    text = RECIPE.replace("epochs: 1", "epochs: 120").replace("small_cnn: {width: 4}", "mlp: {}")
    text += f"checkpoint: {line}\nlog_steps: 5\n"
    trial = trials(tmp_path, text)[0]
    worker = make_worker("solo", {}, "fp32", 0, 1, torch.device("cpu"))
    result = run_trial(worker, Assignment(trial, tmp_path / "trial", tmp_path / "phases"))
    found = list(tmp_path.glob("trial/checkpoints/step_*"))
    assert bool(found) == saved == (result["seconds"]["save"] > 0)
    for path in found:
        assert set(json.loads((path / "manifest.json").read_text())) == {"tensors.safetensors", "state.json"}
