"""Searches from end to end: stages that follow from results on file, whenever a study is ended and however often."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.driver import Driver, drive
from orchestrator.recipe import load
from orchestrator.signals import Stopped
from orchestrator.store import Store
from orchestrator.study import Changed, Study
from orchestrator.workloads.noisy_quadratic import steps_to_target
from tests.orchestrator import small_study

RECIPES = Path(__file__).parents[2] / "recipes"
QUADRATIC = """
study: quadratic
workload:
  data: {noisy_quadratic: {dimension: 20}}
  target: {test_loss: 0.1}
  evaluate: {steps: 1}
engine: solo
cluster: {launcher: solo}
base: {steps: 60, batch: 16, optimizer: {sgd: {momentum: 0}}}
grid: {base.batch: [16, 64]}
search: {space: {base.rate.peak: {log_uniform: [0.05, 1.9]}}, points: 4, winners: 2}
log_steps: 60
"""
Told = dict[str, tuple[Any, ...]]


def study(runs: Path, *sets: str, text: str = QUADRATIC) -> Study:
    return small_study.study(runs, *sets, text=text)


def results(runs: Path, name: str = "quadratic") -> Told:
    """All that a study found, without times."""
    kept = ("arm", "batch", "seed", "point", "role", "edge", "status", "steps", "final")
    found = {r["trial"]: r for r in Store(runs / name).results()}
    return {id: (*(r[k] for k in kept), (r["target"] or {}).get("step")) for id, r in found.items()}


def by_role(runs: Path, role: str) -> list[dict[str, Any]]:
    return [r for r in Store(runs / "quadratic").results() if r["role"] == role]


# ------------------------------------------------------------------------------------------------------------- winners


@pytest.mark.usefixtures("no_report")
def test_winners_are_the_best_points_on_fresh_seeds(runs: Path) -> None:
    assert drive(study(runs)) == 0
    for batch in (16, 64):
        tuning = [r for r in by_role(runs, "tuning") if r["batch"] == batch]
        winners = [r for r in by_role(runs, "winner") if r["batch"] == batch]
        best = min(tuning, key=lambda r: r["target"]["step"] or 10**9)
        assert len(tuning) == 4 and [r["seed"] for r in tuning] == [0] * 4
        assert [r["seed"] for r in winners] == [1, 2] and all(r["point"] == best["point"] for r in winners)
    points = [[r["point"]["base.rate.peak"] for r in by_role(runs, "tuning") if r["batch"] == b] for b in (16, 64)]
    assert points[0] == points[1]
    assert Store(runs / "quadratic").status()["trials"] == {
        **{"total": 12, "done": 12, "failed": 0, "diverged": 0, "pruned": 0, "running": 0, "left": 0}
    }


@pytest.mark.usefixtures("no_report")
def test_a_search_finds_the_best_rate_of_the_noisy_quadratic(runs: Path) -> None:
    """Against the closed form: the best of the points exactly, and the best rate of all to within the points' spacing."""
    drive(study(runs, "search.points=16", "base.steps=120"))
    for batch in (16, 64):
        tuning = [r for r in by_role(runs, "tuning") if r["batch"] == batch]
        rates = sorted(r["point"]["base.rate.peak"] for r in tuning)
        known = {rate: steps_to_target(rate, batch, 0.1, 20) or 10**9 for rate in rates}
        assert {r["point"]["base.rate.peak"]: r["target"]["step"] or 10**9 for r in tuning} == {
            rate: steps if steps <= 120 else 10**9 for rate, steps in known.items()
        }
        (found,) = {r["point"]["base.rate.peak"] for r in by_role(runs, "winner") if r["batch"] == batch}
        assert known[found] == min(known.values())
        dense = np.geomspace(0.05, 1.9, 400)
        steps = np.array([steps_to_target(float(rate), batch, 0.1, 20) or np.inf for rate in dense])
        optimal = dense[steps == steps.min()]
        spacing = max(b / a for a, b in itertools.pairwise(rates))
        assert optimal.min() / spacing <= found <= optimal.max() * spacing


def test_an_edge_is_told_in_the_result_the_report_and_at_the_end(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A box far below the best rate: the best of its points lies at its upper end."""
    box = "search.space={base.rate.peak: {log_uniform: [0.001, 0.2]}}"
    drive(study(runs, box, "search.points=32", "grid.base.batch=[64]", "search.winners=1"))
    (winner,) = by_role(runs, "winner")
    rate = winner["point"]["base.rate.peak"]
    assert winner["edge"] == f"base.rate.peak {rate:g} at the upper edge of [0.001, 0.2]"
    where, remedy = f"{winner['edge']} at batch 64", "widen the box and run it under another `study:` name."
    sentence = f"base: the best point has {where}; {remedy}"
    assert sentence in capsys.readouterr().err
    assert sentence.split("[")[0] in (runs / "quadratic/report.md").read_text()
    assert "role" in (runs / "quadratic/results.csv").read_text().splitlines()[0]


@pytest.mark.usefixtures("no_report")
def test_a_failed_point_leaves_its_search_without_a_winner(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator import driver

    real = driver.run_trial

    def failing(worker: Any, assignment: Any) -> dict[str, Any]:
        if assignment.trial.base.batch == 64 and assignment.trial.base.rate.peak > 0.5:
            raise ValueError("planted")
        return real(worker, assignment)

    monkeypatch.setattr(driver, "run_trial", failing)
    assert drive(study(runs)) == 3
    err = capsys.readouterr().err
    assert "arm base, batch 64: no winner yet" in err and "no winner yet" not in err.replace(
        "batch 64: no winner yet", ""
    )
    assert {r["batch"] for r in by_role(runs, "winner")} == {16}
    monkeypatch.setattr(driver, "run_trial", real)
    assert drive(study(runs)) == 0 and {r["batch"] for r in by_role(runs, "winner")} == {16, 64}


# -------------------------------------------------------------------------------------------------------------- resuming

METHODS = {
    "sobol": [],
    "exact": ["search.prune=exact"],
    "median": ["search.prune={median: {startup: 1, grace: 0}}"],
    "tpe": ["search.method={optuna: {sampler: tpe}}", "search.prune=exact"],
}


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_ended_after_each_trial_and_run_again(
    tmp_path: Path, method: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after each result that was kept, or before the one that follows: the same trials, the same results."""
    sets = METHODS[method]
    whole, broken = tmp_path / "whole" / "runs", tmp_path / "broken" / "runs"
    assert drive(study(whole, *sets)) == 0
    real = Driver._commit

    def interrupted(driver: Driver, run: Any, result: dict[str, Any]) -> None:
        if before and driver.kept:  # type: ignore[attr-defined]
            raise Stopped
        real(driver, run, result)
        driver.kept = True  # type: ignore[attr-defined]
        if not before:
            raise Stopped

    monkeypatch.setattr(Driver, "kept", False, raising=False)
    monkeypatch.setattr(Driver, "_commit", interrupted)
    ends = 0
    while study(broken, *sets).left():
        drive(study(broken, *sets))
        ends += 1
    assert any(r[6] == "pruned" for r in results(whole).values()) == any("prune" in change for change in sets)
    assert ends == 12 and results(broken) == results(whole) and len(results(whole)) == 12


@pytest.mark.usefixtures("no_report")
def test_killed_between_the_search_and_its_winners(tmp_path: Path) -> None:
    """SIGKILL as soon as winners are called for; the same command goes on with them."""
    whole, broken = tmp_path / "whole" / "runs", tmp_path / "broken" / "runs"
    text = QUADRATIC.replace("steps: 60", "steps: 500")
    assert drive(study(whole, text=text)) == 0
    study(broken, text=text)
    command = [sys.executable, "-m", "orchestrator", "run", str(broken.parent / "recipe.yaml"), "-o", str(broken)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        listed, end = broken / "quadratic" / "trials.json", time.monotonic() + 60
        while not (listed.exists() and len(json.loads(listed.read_text())) > 8) and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
    assert len(results(broken)) < 12
    assert drive(study(broken, text=text)) == 0
    assert results(broken) == results(whole)


# -------------------------------------------------------------------------------------------------------- other recipes


@pytest.mark.usefixtures("no_report")
def test_exact_pruning_changes_no_winner_and_can_be_taken_back(runs: Path) -> None:
    drive(study(runs.with_name("full") / "runs"))
    full = results(runs.with_name("full") / "runs")
    assert drive(study(runs, "search.prune=exact")) == 0
    pruned = {id: r for id, r in results(runs).items() if r[6] == "pruned"}
    assert pruned and all(r[7] < 60 for r in pruned.values())
    assert results(runs).keys() == full.keys()
    assert {id: r for id, r in results(runs).items() if id not in pruned} == {
        id: r for id, r in full.items() if id not in pruned
    }
    assert drive(study(runs)) == 0
    assert results(runs) == full


@pytest.mark.usefixtures("no_report")
def test_a_new_target_reads_the_curves_again_and_has_its_own_winners(runs: Path) -> None:
    """A harder target: what was given up at the old one's best step is trained on, unless it still cannot win."""
    harder = "workload.target={test_loss: 0.06}"
    drive(study(runs, "search.prune=exact"))
    drive(study(runs, "search.prune=exact", harder))
    fresh = runs.with_name("fresh") / "runs"
    drive(study(fresh, harder))
    mine = {id: r for id, r in results(runs).items() if r[4] == "winner"}
    assert mine == {id: r for id, r in results(fresh).items() if r[4] == "winner"}
    assert None not in {r["target"]["step"] for r in by_role(runs, "winner")}


@pytest.mark.usefixtures("no_report")
def test_more_points_and_winners_add_to_what_is_there(runs: Path) -> None:
    drive(study(runs))
    before = set(results(runs))
    drive(study(runs, "search.points=6", "search.winners=3"))
    events = [json.loads(line) for line in (runs / "quadratic/journal.jsonl").read_text().splitlines()]
    started = [e["trial"] for e in events if e["event"] == "trial_started"]
    assert len(started) == len(set(started)), "a trial was trained twice"
    assert len([r for r in by_role(runs, "tuning") if r["trial"] in before]) == 8
    assert (len(by_role(runs, "tuning")), len(by_role(runs, "winner"))) == (12, 6)
    with pytest.raises(Changed, match=r"- search\.points: 6\n\+ search\.points: 4"):
        drive(study(runs, "search.winners=3"))
    with pytest.raises(Changed, match=r"search\.seed"):
        drive(study(runs, "search.points=6", "search.winners=3", "search.seed=1"))


def test_the_shipped_recipe_and_its_report_with_numbers_from_fresh_seeds(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = RECIPES / "search_smoke.yaml"
    assert drive(Study(load(path), path.read_text(), runs)) == 0
    found = Store(runs / "search_smoke").results()
    assert len([r for r in found if r["role"] == "tuning"]) == 8
    winners = [r for r in found if r["role"] == "winner"]
    assert len(winners) == 4
    page = (runs / "search_smoke/report.md").read_text()
    assert "| base | 64 | 2 | 6 | 4 | optimizer.sgd.momentum" in page  # two seeds, six trials, four settings tried
    assert "## Searches" in page and "best in the search, steps" in page and "so it flatters" in page
    steps = sorted(r["target"]["step"] for r in winners if r["batch"] == 64)
    said = capsys.readouterr().err
    assert f"in {sum(steps) / 2:g} steps at batch 64" in said
    assert "best of 4 searched points at each batch size, run again with fresh seeds" in said


def test_the_plan_tells_points_and_budget(runs: Path) -> None:
    from orchestrator.plan import as_data, as_text

    data = as_data(study(runs, "search.prune=exact"))
    assert (data["trials"], data["done"]) == (12, 0) and [s["batch"] for s in data["settings"]] == [16, 64]
    assert data["settings"][0]["search"] == {
        **{"method": "sobol", "points": 4, "winners": 2, "prune": "exact", "role": "tuning"}
    }
    assert "sobol 4 points, then the best on 2 fresh seeds: at most 360 steps, pruning exact" in as_text(data)
