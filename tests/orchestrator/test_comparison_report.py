"""What a report says of noise scales, arms seed by seed, performance profiles and tuning budgets, and where it got it."""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any

import pytest

from orchestrator import recipe
from orchestrator.batch_law.law import Law
from orchestrator.driver import drive
from orchestrator.report import figures_comparison
from orchestrator.report.arm_pairs import pairs_note, pairs_table, sentences
from orchestrator.report.arm_profiles import profiles_caption, profiles_table
from orchestrator.report.evidence import evidence
from orchestrator.report.figures import draw
from orchestrator.report.headlines import headlines
from orchestrator.report.load import load
from orchestrator.report.noise_scales import noise_caption, noise_table
from orchestrator.report.summary import Summary, summarise
from orchestrator.report.tables import Table
from orchestrator.report.tuning_budgets import budgets_caption
from orchestrator.study import Study
from tests.orchestrator.made_study import MadeStudy

INF = math.inf


def summary(made: MadeStudy) -> Summary:
    return summarise(load(made.path, None))


def told(made: MadeStudy) -> dict[str, list[dict[str, Any]]]:
    """The evidence, each of whose trials is one of the study."""
    text = evidence(summary(made))
    assert set(re.findall(r'"([0-9a-f]{12})"', text)) <= set(made.ids)
    found: dict[str, list[dict[str, Any]]] = json.loads(text)
    assert all(one["trials"] for kind in found.values() for one in kind)
    cells = [trial for cell in found["cells"] for trial in cell["trials"]]
    winners = [r.trial for r in summary(made).study.results if not r.tuning and not r.failed]
    assert sorted(cells) == sorted(winners)
    return found


def drawn(of: Summary, name: str) -> str:
    """The SVG of a figure, empty if the data do not allow it."""
    files = draw(of, {name: getattr(figures_comparison, name)})
    return files[name]["svg"].decode() if files else ""


def rows(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def with_noise(made: MadeStudy, trial: str, scales: tuple[float, float], rows: int = 128) -> None:
    """Rows in which the noise scale grows from the one to the other, log-linearly in examples."""
    folder = made.path / "trials" / trial
    batch = json.loads((folder / "result.json").read_text())["batch"]
    chance = random.Random(trial)
    lines = []
    for i in range(1, rows + 1):
        scale = scales[0] * (scales[1] / scales[0]) ** ((i - 0.5) / rows)
        signal = 4.0 / i
        row = {"step": i, "phase": 0, "epoch": i * batch / 1437, "examples": i * batch}
        noise = {"train_noise_trace": scale * signal * chance.gauss(1, 0.05)}
        lines.append(row | noise | {"train_noise_signal": signal * chance.gauss(1, 0.2)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# ------------------------------------------------------------------------------------------------------------ noise scale


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """Two arms at seven batch sizes, one with a critical batch size of 200, and trials that measured 40 to 360."""
    made = MadeStudy(tmp_path_factory.mktemp("noisy") / "s")
    for arm, law in {"sgd": Law(30, 200), "lars": Law(1e-3, 5e7)}.items():
        for batch in (16, 32, 64, 128, 256, 512, 1024):
            for seed in range(3):
                trial = made.add(arm, batch, seed, round(law.steps(batch) * (1, 0.97, 1.02)[seed]))
                if batch in (16, 256):
                    with_noise(made, trial, (40, 360))
    return summary(made)


def test_the_noise_scale_is_shown_beside_the_critical_batch_size(noisy):
    svg = drawn(noisy, "noise_scale")
    assert "fitted critical batch size" in svg and "batch 16" in svg and "batch 32" not in svg
    assert "it is shown beside the noise scale, and neither stands for the other." in noise_caption(noisy)[1]
    table = rows(noise_table(noisy))
    assert [(r["arm"], r["batch"], r["trials"], r["rows"]) for r in table] == [
        (arm, batch, "3", "384") for arm in ("sgd", "lars") for batch in ("16", "256")
    ]
    assert re.match(r"(200|190|210) \[\d+-\d+\]$", table[0]["fitted critical batch"])
    assert table[2]["fitted critical batch"].startswith("at least")


def test_the_noise_scale_is_that_of_the_rows(noisy):
    """Its stretches grow from 40 to 360 as they were made, and each is within its own interval."""
    found = json.loads(evidence(noisy))["noise_scale"]
    for curve in found:
        assert len(curve["stretches"]) == 12 and len(curve["trials"]) == 3
        for i, stretch in enumerate(curve["stretches"]):
            true = 40 * 9 ** ((i + 0.5) / 12)
            assert stretch["scale"]["value"] == pytest.approx(true, rel=0.25)
            assert stretch["scale"]["low"] < stretch["scale"]["value"] < stretch["scale"]["high"]
        assert curve["whole"]["low"] < curve["whole"]["value"] < curve["whole"]["high"]


def test_a_noise_scale_near_the_size_of_the_data_is_flagged(tmp_path):
    made = MadeStudy(tmp_path / "s")
    with_noise(made, made.add("sgd", 64, 0, 100), (500, 900))
    (row,) = rows(noise_table(summary(made)))
    assert row["remark"] == "above 25 % of the data set: too low"
    assert "No critical batch size was identified from steps to target" in noise_caption(summary(made))[1]


def test_without_a_probe_nothing_is_said_of_noise(tmp_path):
    made = MadeStudy(tmp_path / "s")
    made.add("sgd", 64, 0, 100)
    assert told(made)["noise_scale"] == [] and noise_table(summary(made)).rows == []
    assert drawn(summary(made), "noise_scale") == ""


# ----------------------------------------------------------------------------------------------------------- seed by seed


def accuracy(value: float) -> dict[str, Any]:
    return {"final": {"test_accuracy": value}, "best": {"test_accuracy": value + 0.001}}


def test_a_difference_in_plain_words(tmp_path):
    made = MadeStudy(tmp_path / "s", target=None)
    lars = (0.921, 0.925, 0.915, 0.928, 0.919)
    for seed, value in enumerate(lars):
        made.add("nesterov", 1024, seed, **accuracy(0.93))
        made.add("lars", 1024, seed, **accuracy(value))
    assert sentences(summary(made)) == [
        "lars - nesterov at batch 1024: final test accuracy -0.8 points [-1.5, -0.2], p 0.021 after Holm; 5 seeds."
    ]
    final, best = told(made)["paired"]
    assert (final["found"]["n"], final["found"]["below"], final["found"]["above"]) == (5, 5, 0)
    assert final["found"]["most"] == pytest.approx(sum(lars) / 5 - 0.93)
    assert final["adjusted"] == final["found"]["p"] and best["adjusted"] == best["found"]["p"]  # one test of each
    assert final["trials"] == [[made.ids[2 * i + 1], made.ids[2 * i]] for i in range(5)]


def test_only_seeds_that_both_have_are_compared(tmp_path):
    made = MadeStudy(tmp_path / "s")
    for seed in range(4):
        made.add("sgd", 64, seed, 100 + 10 * seed)
    for seed in range(1, 3):
        made.add("lars", 64, seed, 220 + 10 * seed)
    steps = told(made)["paired"][0]
    assert steps["quantity"] == "steps to target" and steps["found"]["n"] == 2
    assert steps["found"]["most"] == pytest.approx((math.log(230 / 110) + math.log(240 / 120)) / 2)
    assert "+104 %" in rows(pairs_table(summary(made)))[0]["mean difference"]


def test_arms_without_a_seed_in_common_say_so(tmp_path):
    made = MadeStudy(tmp_path / "s")
    made.add("sgd", 64, 0, 100)
    made.add("lars", 64, 1, 120, role="winner")
    assert told(made)["paired"] == [] and told(made)["profiles"] == []
    assert sentences(summary(made)) == [
        "lars - sgd: no seed was trained on both sides, so there are no differences by seed."
    ]


def test_a_miss_is_told_and_leaves_a_bound(tmp_path):
    """lars misses twice, after 23 steps at least of which sgd needs 10 and 20."""
    made = MadeStudy(tmp_path / "s")
    for seed, (fast, slow) in enumerate([(10, 15), (20, INF), (10, INF), (10, 16)]):
        made.add("sgd", 1437, seed, fast)
        made.add("lars", 1437, seed, slow, **({"steps": 40} if slow == INF else {}))
    (sentence,) = sentences(summary(made))
    assert "steps to target at least +" in sentence and "(2 of lars missed the target)" in sentence
    steps = told(made)["paired"][0]
    assert steps["found"]["most"] is None and steps["found"]["high"] is None
    ratios = [1.5, 2.0, 4.0, 1.6]
    assert steps["found"]["least"] == pytest.approx(sum(map(math.log, ratios)) / 4)
    assert (steps["found"]["test"], steps["found"]["p"], steps["missed"]) == ("sign", 0.125, [2, 0])


def test_a_trial_that_diverged_is_worse_by_an_unknown_amount(tmp_path):
    made = MadeStudy(tmp_path / "s", target=None)
    for seed in range(3):
        made.add("sgd", 64, seed, **accuracy(0.9))
        nan = {"final": {"test_accuracy": None}, "status": "diverged"}
        made.add("lars", 64, seed, **(nan if seed == 2 else accuracy(0.91 + 0.01 * seed)))
    final = told(made)["paired"][0]
    assert final["found"]["least"] is None and final["found"]["most"] == pytest.approx(0.01)
    assert (final["found"]["below"], final["found"]["above"], final["missed"]) == (1, 2, [1, 0])
    assert rows(pairs_table(summary(made)))[0]["mean difference"] == "at most +1.0 points"


def two_arms(made: MadeStudy, batches: dict[int, float]) -> None:
    """lars takes half as many steps again as sgd, which takes about as many as stated by batch size."""
    for batch, steps in batches.items():
        for seed in range(5):
            made.add("sgd", batch, seed, steps + 3 * seed)
            made.add("lars", batch, seed, 1.5 * steps + 5 * seed)


def test_arms_are_compared_at_the_largest_batch_size_that_tells(tmp_path):
    made = MadeStudy(tmp_path / "s")
    two_arms(made, {64: 100, 128: INF})
    pair, nobody, leading = headlines(summary(made))[2:]
    assert pair.startswith("lars - sgd at batch 64: steps to target +51")
    assert nobody == "No arm reached test accuracy 0.95 in the median at batch 128."
    assert leading.startswith("At batch 64, sgd takes 106 steps and lars 160;")
    assert "not known" not in " ".join([pair, leading])


def test_where_no_arm_reached_the_target_anywhere_the_ends_are_compared(tmp_path):
    made = MadeStudy(tmp_path / "s")
    two_arms(made, {64: INF, 128: INF})
    pair, nobody, leading = headlines(summary(made))[2:]
    assert pair.startswith(
        "lars - sgd at batch 128: steps to target not known (5 of lars and 5 of sgd missed the target)"
    )
    assert nobody == "No arm reached test accuracy 0.95 in the median at batches 64 and 128."
    assert leading.startswith("At batch 128, test accuracy ends sgd at ")


def test_where_trials_stop_at_the_target_only_steps_are_compared(tmp_path):
    """Holm over the two batch sizes that have a test: the third, where all trials missed, has none."""
    made = MadeStudy(tmp_path / "s")
    two_arms(made, {32: 200, 64: 100, 128: INF})
    for config in made.path.glob("trials/*/config.json"):
        content = json.loads(config.read_text())
        content["workload"]["target"] = {"test_accuracy": 0.95, "stop": True}
        config.write_text(json.dumps(content))
    found = told(made)["paired"]
    assert [(c["batch"], c["quantity"]) for c in found] == [(b, "steps to target") for b in (32, 64, 128)]
    p = [c["found"]["p"] for c in found]
    assert p[2] is None and found[2]["adjusted"] is None
    assert min(c["adjusted"] for c in found[:2]) == pytest.approx(2 * min(p[:2]))
    assert (rows(pairs_table(summary(made)))[2]["p"], rows(pairs_table(summary(made)))[2]["test"]) == ("", "")
    assert "only steps are compared. p after Holm holds for all tests of a quantity together (2 of steps" in pairs_note(
        summary(made)
    )


def test_with_many_arms_each_is_compared_with_the_first(tmp_path):
    made = MadeStudy(tmp_path / "s", target=None)
    for arm in "abcd":
        for seed in range(2):
            made.add(arm, 64, seed, **accuracy(0.9 + 0.01 * seed))
    assert {(c["arm"], c["other"]) for c in told(made)["paired"]} == {("b", "a"), ("c", "a"), ("d", "a")}
    assert "each arm is compared with the first" in pairs_note(summary(made))


# --------------------------------------------------------------------------------------------------------------- profiles


def test_profiles_by_hand(tmp_path):
    """slow takes 1, 2, 4 times the steps of fast and misses once: scores 3/4 and (1 + 2/3 + 0) / 4 of the four workloads."""
    made = MadeStudy(tmp_path / "s")
    for (batch, seed), steps in {(32, 0): 40, (32, 1): 40, (64, 0): 80, (64, 1): INF}.items():
        made.add("fast", batch, seed, 40 if steps == 40 and seed == 0 else 20 if steps < INF else INF)
        made.add("slow", batch, seed, steps)
    made.add("slow", 128, 0, 10)  # at a batch size of its own: no workload to compare
    fast, slow = told(made)["profiles"]
    assert fast["in_steps"] == [1, 1, 1, None] and slow["in_steps"] == [1, 2, 4, None]
    assert fast["score"] == pytest.approx(3 / 4) and slow["score"] == pytest.approx((1 + 2 / 3) / 4)
    assert slow["mean_ratio"] == pytest.approx(2) and slow["solved"] == 3
    table = rows(profiles_table(summary(made)))
    assert [r["score, steps"] for r in table] == ["0.750", "0.417"]
    text = profiles_caption(summary(made))[1]
    assert "Left out: batch 128, without a seed that all arms have there." in text
    assert "1 workload that no arm solved counts against all." in text
    assert "In examples seen the profile is the same" in text


def test_examples_have_a_profile_of_their_own_where_batches_grow(tmp_path):
    made = MadeStudy(tmp_path / "s")
    made.add("plain", 32, 0, 100)
    trial = made.add("growing", 32, 0, 50)
    path = made.path / "trials" / trial / "result.json"
    result = json.loads(path.read_text())
    result["target"]["examples"] = 6400
    path.write_text(json.dumps(result))
    plain, growing = told(made)["profiles"]
    assert (plain["in_steps"], plain["in_examples"]) == ([2], [1])
    assert (growing["in_steps"], growing["in_examples"]) == ([1], [2])
    assert "score, examples" in rows(profiles_table(summary(made)))[0]


# ----------------------------------------------------------------------------------------------------------------- budget


def search(made: MadeStudy, arm: str, steps: list[float], **changes: Any) -> list[str]:
    points = [{"base.batch": 64, "base.rate.peak": 0.1 * (i + 1)} for i in range(len(steps))]
    return [
        made.add(arm, 64, 0, s, point=point, role="tuning", **changes) for s, point in zip(steps, points, strict=True)
    ]


def test_a_tuning_budget_by_hand(tmp_path):
    """1 / steps of 10, 20, 40 and a miss; of two random points the best is 1/10, 1/20, 1/40 in 3, 2 and 1 of 6 pairs."""
    made = MadeStudy(tmp_path / "s")
    ids = search(made, "sgd", [40, INF, 10, 20])
    search(made, "lars", [10, 20, 30])
    sgd, lars = told(made)["budgets"]
    means = [(1 / 10 + 1 / 20 + 1 / 40) / 4, (3 / 10 + 2 / 20 + 1 / 40) / 6, (3 / 10 + 1 / 20) / 4, 1 / 10]
    assert [1 / best for best in sgd["best"]] == pytest.approx(means)
    assert sgd["trials"] == [[i] for i in ids] and sgd["worst"] == 1 and len(lars["best"]) == 3
    assert all(
        low <= best <= (high or INF) for low, best, high in zip(sgd["low"], sgd["best"], sgd["high"], strict=True)
    )
    assert "expected best steps to target" in drawn(summary(made), "tuning_budget")


def test_points_that_were_given_up_leave_a_range(tmp_path):
    """The last of ten points was given up after 12 steps: it would have taken more, or never come there."""
    made = MadeStudy(tmp_path / "s")
    search(made, "sgd", [10] + [20] * 8)
    point = {"base.batch": 64, "base.rate.peak": 5.0}
    made.add("sgd", 64, 0, point=point, role="tuning", status="pruned", steps=12)
    (found,) = told(made)["budgets"]
    assert found["best"] is None and found["given_up"] == 1
    never, at_once = (1 / 10 + 8 / 20) / 10, (1 / 10 + 8 / 20 + 1 / 12) / 10
    assert found["low"][0] < 1 / at_once < 1 / never < found["high"][0]
    assert "1 point was given up" in budgets_caption(summary(made))[1]


def test_a_budget_without_a_target_counts_metrics(tmp_path):
    made = MadeStudy(tmp_path / "s", target=None)
    for i, value in enumerate([0.7, 0.9, 0.8]):
        point = {"base.batch": 64, "base.rate.peak": 0.1 * (i + 1)}
        made.add("sgd", 64, 0, point=point, role="tuning", **accuracy(value))
    (found,) = told(made)["budgets"]
    assert found["best"] == pytest.approx([0.8, (2 * 0.9 + 0.8) / 3, 0.9])
    assert all(low <= high for low, high in zip(found["low"], found["high"], strict=True))


def test_points_chosen_by_results_have_no_random_budget(tmp_path):
    made = MadeStudy(tmp_path / "s")
    search(made, "sgd", [10, 20, 30])
    text = """
    study: s
    workload: {data: digits, model: {mlp: {}}}
    base: {epochs: 1, batch: 64}
    search: {space: {base.rate.peak: {log_uniform: [0.01, 1]}}, points: 3, method: {optuna: {}}}
    arms: {sgd: {}}
    """
    (made.path / "resolved.yaml").write_text(text)
    assert told(made)["budgets"] == []


# ------------------------------------------------------------------------------------------------------------- end to end

MEASURED = """
study: measured
workload: {data: digits, model: {mlp: {width: 8, depth: 1}}, evaluate: {epochs: 1}}
engine: solo
cluster: {launcher: solo}
base: {epochs: 0.5, batch: 32, micro_batch: 8}
strategies: [noise_scale]
log_steps: 3
"""


def test_a_study_that_measures_noise_reports_it(tmp_path):
    """By hand from its rows: each counts by its examples, trace and signal are averaged apart."""
    (tmp_path / "recipe.yaml").write_text(MEASURED)
    assert drive(Study(recipe.load(tmp_path / "recipe.yaml", ()), MEASURED, tmp_path / "runs")) == 0
    (file,) = (tmp_path / "runs").glob("measured/trials/*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    sums, before = [0.0, 0.0], 0
    for line in lines:
        for i, name in enumerate(("train_noise_trace", "train_noise_signal")):
            sums[i] += line[name] * (line["examples"] - before)
        before = line["examples"]
    (curve,) = json.loads((tmp_path / "runs" / "measured" / "evidence.json").read_text())["noise_scale"]
    assert curve["whole"]["value"] == pytest.approx(sums[0] / sums[1]) and curve["whole"]["rows"] == len(lines)
    assert curve["trials"] == [file.parent.name]
