"""What a report says of searches: what they tried and chose, and what is missing while one has no winner."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from orchestrator.report.arm_profiles import profiles_caption
from orchestrator.report.evidence import evidence
from orchestrator.report.headlines import headlines
from orchestrator.report.load import load
from orchestrator.report.search_table import search_table
from orchestrator.report.summary import Summary, summarise
from tests.orchestrator.made_study import MadeStudy

RECIPE: dict[str, Any] = {
    "study": "s",
    "workload": {"data": {"digits": {}}},
    "base": {"epochs": 20, "batch": 32},
    "grid": {"base.batch": [32, 64]},
    "search": {"space": {"base.rate.peak": {"log_uniform": [0.01, 1]}}, "points": 2, "winners": 2},
    "arms": {"sgd": {}, "adamw": {"base": {"optimizer": "adamw"}}, "nesterov": {}},
}


def summary(made: MadeStudy, arms: tuple[str, ...] = ("sgd", "adamw")) -> Summary:
    """As the report of a study with these arms in its recipe has it."""
    stated = RECIPE | {"arms": {arm: RECIPE["arms"][arm] for arm in arms}}
    (made.path / "resolved.yaml").write_text(yaml.safe_dump(stated, sort_keys=False))
    return summarise(load(made.path, made.ids))


def searched(made: MadeStudy, arm: str, batch: int, steps: tuple[float, float] = (200, 100), **broken: Any) -> None:
    """Two points and, unless the first of them is broken, the winner on two fresh seeds."""
    points = [{"base.batch": batch, "base.rate.peak": peak} for peak in (0.1, 0.2)]
    made.add(arm, batch, 0, steps[0], point=points[0], role="tuning", **broken)
    made.add(arm, batch, 0, steps[1], point=points[1], role="tuning")
    for seed in () if broken else (1, 2):
        made.add(arm, batch, seed, steps[1] + 5, point=points[1], role="winner")


def table(of: Summary) -> list[dict[str, str]]:
    found = search_table(of)
    return [dict(zip(found.header, row, strict=True)) for row in found.rows]


def test_an_interrupted_study_counts_the_winners_to_come_and_names_arms_without_a_result(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path / "s")
    searched(made, "sgd", 32)
    found = headlines(summary(made, ("sgd", "adamw", "nesterov")))
    assert found[:2] == ["partial: 4 of 24 trials have a result.", "adamw and nesterov have no result yet."]


def test_a_whole_study_says_nothing_of_gaps(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path / "s")
    for arm in ("sgd", "adamw"):
        for batch in (32, 64):
            searched(made, arm, batch)
    assert headlines(summary(made))[0].startswith("sgd reaches")


def test_a_failed_point_is_told_where_its_cell_is_missing(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path / "s")
    for arm in ("sgd", "adamw"):
        searched(made, arm, 32)
    searched(made, "sgd", 64)
    searched(made, "adamw", 64, status="failed", final={}, best={}, target=None, error="broken")
    found = summary(made)
    assert headlines(found)[:3] == [
        "partial: 14 of 16 trials have a result.",
        "1 of 16 trials failed and is left out of all figures.",
        "adamw at batch 64: its search has no winner with a result yet; missing from medians, fits and comparisons.",
    ]
    assert "Left out: batch 64, without a seed that all arms have there." in profiles_caption(found)[1]


def test_a_batch_size_of_a_grid_whose_trials_all_failed_is_told(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path / "s")
    made.add("sgd", 32, 0, 100)
    for batch in (64, 128):
        made.add("sgd", batch, 0, status="failed", final={}, target=None)
    line = "sgd at batches 64 and 128: all trials failed; missing from medians, fits and comparisons."
    assert headlines(summarise(load(made.path, None)))[1] == line


def test_edges_are_a_sentence_per_arm_after_what_was_found(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path / "s")
    rate, momentum = "rate 1 at the upper edge of [0, 1]", "momentum 0 at the lower edge of [0, 1]"
    for batch, edge in ((32, rate), (64, rate), (128, f"{rate}; {momentum}"), (256, None)):
        made.add("sgd", batch, 1, 100, role="winner", edge=edge)
    found = headlines(summarise(load(made.path, None)))
    assert found[0].startswith("sgd reaches")
    where = f"{rate} at batches 32, 64 and 128 and {momentum} at batch 128"
    assert found[1] == f"sgd: the best point has {where}; widen the box and run it under another `study:` name."


def test_the_best_in_the_search_is_the_median_that_the_winner_was_chosen_by(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path / "steps")
    accurate = MadeStudy(tmp_path / "metric", target=None)
    point = {"base.batch": 32, "base.rate.peak": 0.1}
    for seed, steps in enumerate((40, 90, 95)):
        made.add("sgd", 32, seed, steps, point=point, role="tuning")
        accurate.add("sgd", 32, seed, point=point, role="tuning", final={"test_accuracy": 1 - steps / 100})
    made.add("sgd", 32, 3, 91, point=point, role="winner")
    accurate.add("sgd", 32, 3, point=point, role="winner", final={"test_accuracy": 0.2})
    assert table(summary(made, ("sgd",)))[0]["best in the search, steps"] == "90"
    assert table(summary(accurate, ("sgd",)))[0]["best in the search, test accuracy"] == "0.100"


def test_the_trials_of_each_search_are_in_the_evidence(tmp_path: Path) -> None:
    """Also of one without a hit, with fewer points than a curve of budgets takes, and with a failed trial."""
    made = MadeStudy(tmp_path / "s")
    searched(made, "sgd", 32, (math.inf, math.inf))
    searched(made, "adamw", 64, status="failed", final={}, target=None)
    found = json.loads(evidence(summary(made)))["searches"]
    assert found == [
        {"arm": "sgd", "batch": 32, "trials": made.ids[:2], "chosen": [made.ids[1]]},
        {"arm": "adamw", "batch": 64, "trials": made.ids[4:], "chosen": []},
    ]
