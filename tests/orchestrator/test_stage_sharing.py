"""Trials that begin alike share what they have trained: the eight nets of Griswold's study, a search of stage after stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver import drive
from orchestrator.garbage import collect
from orchestrator.phases import PhaseStore
from orchestrator.recipe import load
from orchestrator.store import Store
from orchestrator.study import Study
from strategies.contract import PlanError
from tests.orchestrator.test_plain_cnn import CNNS

pytestmark = pytest.mark.usefixtures("no_report")

RECIPE = """
study: {name}
workload:
  data: digits
  model: {{plain_cnn: {{stages: {stages}, width: 4}}}}
  evaluate: {{steps: 2}}
engine: solo
cluster: {{launcher: solo}}
precision: fp32
speed: {{patch_convolutions: false}}
base: {{steps: 2, batch: 64, rate: {{peak: 0.05}}}}
strategies: [{{stage_wise: {options}}}]
log_steps: 2
{more}
"""
SEARCH = """
search:
  method: griswold
  points: 3
  winners: 1
  space: {base.rate.peak: {exponential: 0.01}, base.optimizer.sgd.weight_decay: {exponential: 0.001}}
"""


def run(runs: Path, name: str, stages: list[str], options: dict[str, Any], more: str = "") -> Store:
    text = RECIPE.format(name=name, stages=json.dumps(stages), options=json.dumps({"head": "own"} | options), more=more)
    runs.mkdir(exist_ok=True)
    path = runs / f"{name}.yaml"
    path.write_text(text)
    assert drive(Study(load(path), text, runs)) == 0
    return Store(runs / name)


def ended(store: Store) -> list[dict[str, int]]:
    """What the journal tells of each trial's phases."""
    rows = [json.loads(line) for line in (store.directory / "journal.jsonl").read_text().splitlines()]
    return [row["phases"] for row in rows if row["event"] == "trial_ended"]


def weights(runs: Path, store: Store, trial: str) -> dict[str, list[float]]:
    last = [name for name in json.loads((store.trial(trial) / "phases.json").read_text()) if "." not in name][-1]
    record = PhaseStore(runs / ".phases").get(last)
    assert record
    return {name: value.flatten().tolist() for name, value in record.weights.items()}


def test_eight_nets_take_twelve_trainings(tmp_path: Path) -> None:
    """Of 17 stages: the others were trained for another net."""
    grid = f"grid: {{workload.model.plain_cnn.stages: {json.dumps(list(CNNS.values()))}}}"
    phases = ended(run(tmp_path, "eight", ["P"], {}, grid))
    assert sum(p["trained"] + p["reused"] for p in phases) == 17
    assert sum(p["trained"] for p in phases) == 12
    kept = [p for p in (tmp_path / ".phases").iterdir() if p.is_dir()]
    assert len(kept) == 12


@pytest.mark.parametrize("cache", ["off", "exact"])
def test_a_stage_is_searched_with_the_best_of_the_one_before(cache: str, tmp_path: Path) -> None:
    """The trials of the second search train their second stage alone, and end where an unshared run ends, bit for bit."""
    runs, alone = tmp_path / "shared", tmp_path / "alone"
    one = run(runs, "one", ["C3 P"], {}, SEARCH)
    best = next(r for r in one.results() if r["role"] == "winner")["point"]
    found = {
        "rates": [best["base.rate.peak"], None],
        "weight_decay": [best["base.optimizer.sgd.weight_decay"], None],
        "cache": cache,
    }
    two = run(runs, "two", ["C3 P", "C3 P"], found, SEARCH)
    assert ended(one) == [{"trained": 1, "reused": 0}] * 4
    assert ended(two) == [{"trained": 1, "reused": 1}] * 4  # the winner's seed is that of the first search's winner
    unshared = run(alone, "two", ["C3 P", "C3 P"], found, SEARCH)
    first = {"trained": 2, "reused": 0}
    assert ended(unshared) == [first, {"trained": 1, "reused": 1}, {"trained": 1, "reused": 1}, first]
    for here, there in zip(two.results(), unshared.results(), strict=True):
        assert here["trial"] == there["trial"] and here["final"] == there["final"]
        assert weights(runs, two, here["trial"]) == weights(alone, unshared, there["trial"])


def test_features_are_kept_beside_the_phases(tmp_path: Path) -> None:
    store = run(tmp_path, "kept", ["C3 P", "C1"], {"cache": "uint8"})
    names = json.loads((store.trial(store.trial_ids()[0]) / "phases.json").read_text())
    assert sorted(p.name for p in (tmp_path / ".phases").iterdir() if p.is_dir()) == sorted(names)
    assert [name.partition(".")[2] for name in names] == ["", "", "uint8"]
    assert collect(tmp_path, delete=False) == []
    shutil.rmtree(store.directory)
    assert sorted(unused.path.name for unused in collect(tmp_path, delete=True)) == sorted(names)
    assert not [p for p in (tmp_path / ".phases").iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", None),
        ("workload.augment.flip=true", "workload.augment shows other images"),
        ("strategies=[{stage_wise: {cache: exact}}, mixup]", "a strategy that changes batches"),
        ("strategies=[{stage_wise: {cache: exact}}, test_time_augmentation]", "looks at images in several ways"),
    ],
)
def test_the_cache_refuses_what_shows_other_images(more: str, message: str | None, tmp_path: Path) -> None:
    from orchestrator.plan import check_plans

    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(name="r", stages='["C3", "P"]', options='{"cache": "exact"}', more=""))
    recipe = load(path, [more] if more else [])
    if message is None:
        assert check_plans(recipe) == 1
    else:
        with pytest.raises(PlanError, match=message):
            check_plans(recipe)
