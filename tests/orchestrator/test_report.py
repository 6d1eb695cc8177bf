"""The report of made-up studies: what it says, what it leaves unsaid, and that its files agree with each other."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pyarrow.parquet
import pytest

from orchestrator.files import Damaged
from orchestrator.report import build
from orchestrator.report.pages import escaped_markdown
from tests.orchestrator.made_study import MadeStudy, quickstart

FILES = ["report.html", "report.md", "results.csv", "results.parquet", "evidence.json"]
FIGURES = ["final_metric", "steps_to_target", "time_to_target", "training_curves"]
WHOLE = sorted([*FIGURES, "performance_profile", "prediction"])  # of several arms at several batch sizes, on 2 workers


def figures(path: Path) -> list[str]:
    found = sorted(p.name for p in (path / "figures").iterdir())
    names = sorted({name.partition(".")[0] for name in found})
    assert found == [f"{name}.{kind}" for name in names for kind in ("pdf", "svg")]
    return names


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, list[str]]:
    made = quickstart(tmp_path_factory.mktemp("study") / "quickstart")
    return made.path, build(made.path, made.ids)


# --------------------------------------------------------------------------------------------------------- the whole of it


def test_headlines_of_a_whole_study(study):
    assert study[1] == [
        "sgd reaches test accuracy 0.95 in 310 steps at batch 32 and in 16 at batch 1437 (19 x fewer steps for 45 x the "
        "batch; medians of 3 seeds, ranges 294-341 and 15-18); scaling stays within 20 % of perfect up to batch 128. Its "
        "critical batch size cannot be told from these batch sizes: at least 230.",
        "adamw reaches test accuracy 0.95 in 290 steps at batch 32 and in 40 at batch 512 (7.2 x fewer steps for 16 x the "
        "batch; medians of 3 seeds, ranges 276-319 and 38-44); scaling stays within 20 % of perfect up to batch 128. Its "
        "critical batch size is 580 (95 % interval 180-3300). adamw missed the target in 2 of 3 seeds at batch 1437 within "
        "its budget of 20 epochs.",
        "adamw - sgd at batch 1437: steps to target at least +19 % [-8, ..] (2 of adamw missed the target), p 0.25 after "
        "Holm; final test accuracy 0 points in each seed; 3 seeds.",
        "At batch 1437, only sgd reaches the target in the median (hits: sgd 3 of 3 and adamw 1 of 3). Their ranges overlap, "
        "so neither is called faster.",
    ]


def test_a_budget_stated_at_another_batch_size_says_so(tmp_path):
    made = MadeStudy(tmp_path, target=None)
    config = tmp_path / "trials" / made.add("adascale", 512, 0) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"strategies": [["adascale", {"per": 32}]]}))
    assert "at batch 512 with a budget of 20 epochs at batch 32 (" in build(tmp_path, made.ids)[0]


def test_every_file_is_there_and_small(study):
    path, _ = study
    assert figures(path) == WHOLE
    assert all((path / name).stat().st_size > 1000 for name in FILES)
    assert (path / "report.html").stat().st_size < 500_000
    assert not list(path.rglob("*.tmp"))


def test_html_is_self_contained(study):
    text = (study[0] / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and policy[1].startswith("default-src 'none';")
    assert not re.search(r"<(link|img|iframe|object|base)\b|@import|url\((?!#)", text)
    assert not re.search(r'(?:href|src)="(?!#)', text)
    assert text.count("<svg") == len(WHOLE)


def test_ids_are_unique_and_references_resolve(study):
    text = (study[0] / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    references = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert len(ids) == len(set(ids))
    assert references and references <= set(ids)


def test_markdown_has_headlines_figures_and_tables(study):
    path, headlines = study
    text = (path / "report.md").read_text()
    assert all(f"- {escaped_markdown(sentence)}\n" in text for sentence in headlines)
    assert all(f"](figures/{name}.svg)" in text for name in WHOLE)
    rows = [line for line in text.splitlines() if re.match(r"\| 0000000000", line)]
    assert len(rows) == 24 and len({row.count("|") for row in rows}) == 1


def test_csv_and_parquet_say_the_same_and_what_the_trials_said(study):
    path, _ = study
    table = pyarrow.parquet.read_table(path / "results.parquet").to_pylist()
    with open(path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(table) == len(lines) == 24
    for row, line in zip(table, lines, strict=True):
        assert list(row) == list(line)
        for name, value in row.items():
            text = line[name]
            assert (
                (text == "")
                if value is None
                else (text == str(value).lower())
                if isinstance(value, bool)
                else (text == value if isinstance(value, str) else float(text) == value)
            )
        result = json.loads((path / "trials" / row["trial"] / "result.json").read_text())
        assert row["target_step"] == result["target"]["step"]
        assert row["final_test_accuracy"] == result["final"]["test_accuracy"]
        assert row["point.base.batch"] == result["batch"]
        assert row["seconds_train"] == result["seconds"]["train"]


def test_report_is_reproducible_to_the_byte(tmp_path):
    first, second = quickstart(tmp_path / "a"), quickstart(tmp_path / "b")
    for made in (first, second):
        build(made.path)
    for name in [*FILES, *(f"figures/{f}.{kind}" for f in WHOLE for kind in ("svg", "pdf"))]:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name


def test_import_is_light():
    code = "import sys, orchestrator.report; assert not {'matplotlib', 'pyarrow', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --------------------------------------------------------------------------------------------------------- odd studies


def test_ranges_apart_are_told_as_seen_and_never_as_best(tmp_path):
    made = MadeStudy(tmp_path / "s")
    for seed, (fast, slow) in enumerate([(100, 200), (110, 190), (90, 230)]):
        made.add("sgd", 64, seed, fast)
        made.add("lars", 64, seed, slow)
    assert build(made.path)[-1] == (
        "At batch 64, sgd takes 100 steps and lars 200; paired by seed, the ratio is 0.50 (range 0.39-0.58 over 3 pairs). "
        "Their ranges do not overlap: each trial of sgd was faster than any of lars."
    )


def test_six_seeds_give_intervals(tmp_path):
    made = MadeStudy(tmp_path / "s")
    for seed in range(6):
        made.add("sgd", 64, seed, 100 + seed)
        made.add("lars", 64, seed, 200 + seed)
    headlines = build(made.path)
    assert "median of 6 seeds, 95 % interval 100-105" in headlines[0]
    assert headlines[-1].endswith("Their 95 % intervals do not overlap: sgd is faster than lars here.")


def test_of_several_arms_the_two_in_front_are_compared(tmp_path):
    made = MadeStudy(tmp_path / "s")
    for arm, steps in {"a": 300, "b": 100, "c": 120}.items():
        for seed in range(3):
            made.add(arm, 64, seed, steps + 30 * seed)
    last = build(made.path)[-1]
    assert last.startswith("At batch 64, the two leading arms of 3: b takes 130 steps and c 150")
    assert last.endswith("Their ranges overlap, so neither is called faster.")


def test_a_single_seed_claims_nothing(tmp_path):
    made = MadeStudy(tmp_path / "s")
    made.add("sgd", 32, 0, 300)
    made.add("sgd", 64, 0, 150)
    made.add("lars", 64, 0, 100)
    headlines = build(made.path)
    assert "(2 x fewer steps for 2 x the batch; 1 seed, so no interval)" in headlines[0]
    assert (
        headlines[-1] == "At batch 64, lars takes 100 steps and sgd 150. With a single seed, neither is called faster."
    )


def test_one_arm_has_no_comparison(tmp_path):
    made = MadeStudy(tmp_path / "s")
    for batch, steps in {32: 300, 64: 280}.items():
        made.add("sgd", batch, 0, steps)
    (headline,) = build(made.path)
    assert headline.endswith("steps exceed perfect scaling by more than 20 % already at batch 64.")


def test_one_batch_size(tmp_path):
    made = MadeStudy(tmp_path / "s")
    for seed in range(3):
        made.add("sgd", 64, seed, 100 + seed)
    assert build(made.path) == [
        "sgd reaches test accuracy 0.95 in 101 steps at batch 64 (median of 3 seeds, range 100-102)."
    ]
    assert figures(made.path) == FIGURES
    for page in ("report.md", "report.html"):
        assert "No prediction for sgd: the target was reached at fewer than three" in (made.path / page).read_text()


def test_a_target_that_nobody_reached(tmp_path):
    made = MadeStudy(tmp_path / "s")
    for batch in (32, 64):
        for seed in range(3):
            made.add("sgd", batch, seed)
    assert build(made.path) == [
        "sgd did not reach test accuracy 0.95 in the median at any of 2 batch sizes (0 of 6 trials reached it) within its "
        "budget of 20 epochs."
    ]
    assert figures(made.path) == ["final_metric", "steps_to_target", "training_curves"]
    svg = (made.path / "figures" / "steps_to_target.svg").read_text()
    assert "not reached by then" in svg


def test_no_target_compares_final_metrics(tmp_path):
    made = MadeStudy(tmp_path / "s", target=None)
    for arm in ("sgd", "lars"):
        for batch in (32, 1024):
            for seed in range(3):
                made.add(arm, batch, seed)
    headlines = build(made.path)
    assert headlines[0] == (
        "sgd ends at test accuracy 0.971 at batch 32 and 0.952 at batch 1024 with a budget of 20 epochs (medians of 3 seeds, "
        "ranges 0.969-0.973 and 0.950-0.954)."
    )
    assert headlines[2] == "lars - sgd at batch 1024: final test accuracy 0 points in each seed; 3 seeds."
    assert headlines[3].endswith("Their ranges overlap, so neither is called better.")
    assert figures(made.path) == ["final_metric", "training_curves"]


def test_losses_only(tmp_path):
    made = MadeStudy(tmp_path / "s", target=("train_loss", 0.1))
    for batch, steps in {1: 900, 8: 120}.items():
        made.add("sgd", batch, 0, steps, final={"train_loss": 0.012345}, best={"train_loss": 0.012345})
    (headline,) = build(made.path)
    assert headline.startswith(
        "sgd reaches train loss 0.1 in 900 steps at batch 1 and in 120 at batch 8 (7.5 x fewer steps"
    )
    assert figures(made.path) == FIGURES
    assert "final train loss" in (made.path / "report.md").read_text()


def test_figures_that_no_longer_hold_go_away(tmp_path):
    made = MadeStudy(tmp_path / "s")
    hit = made.add("sgd", 32, 0, 100)
    build(made.path)
    assert figures(made.path) == FIGURES
    result = json.loads((made.path / "trials" / hit / "result.json").read_text())
    (made.path / "trials" / hit / "result.json").write_text(json.dumps({**result, "target": None}))
    build(made.path)
    assert figures(made.path) == ["final_metric", "training_curves"]


def test_diverged_trials_count_as_misses_and_failed_ones_not_at_all(tmp_path):
    made = MadeStudy(tmp_path / "s")
    for seed, steps in enumerate([100, 104, 96]):
        made.add("sgd", 32, seed, steps)
    nan = {"final": {"test_accuracy": None, "train_loss": None}, "steps": 7, "error": "the loss is not finite"}
    made.add("sgd", 64, 0, 60)
    made.add("sgd", 64, 1, status="diverged", **nan)
    made.add("sgd", 64, 2, status="diverged", **nan)
    broken = {"status": "failed", "error": {"kind": "ValueError", "message": "bad\x1b]0;title\x07 news"}}
    folder = made.path / "trials" / made.add("lars", 32, 0)
    (folder / "result.json").write_text(json.dumps({"trial": "x", "arm": "lars", "batch": 32, "seed": 0, **broken}))
    headlines = build(made.path)
    assert headlines[0] == "1 of 7 trials failed and is left out of all figures."
    missed = "sgd missed the target in 2 of 3 seeds at batch 64 within its budget of 20 epochs; 2 of 3 diverged."
    assert headlines[1].endswith(missed)
    assert headlines[2] == "lars: all trials failed."
    assert "; 2 of them diverged there." in (made.path / "report.md").read_text()
    for name in ("report.html", "report.md", "results.csv"):
        text = (made.path / name).read_text()
        assert "ValueError" in text and "news" in text
        assert "\x1b" not in text and "\x07" not in text


def test_a_partial_study_says_so(tmp_path):
    made = quickstart(tmp_path / "s")
    for trial in made.ids[:3]:
        (made.path / "trials" / trial / "result.json").unlink()
    (made.path / "trials" / made.ids[3] / "metrics.jsonl").unlink()
    assert build(made.path, [*made.ids, "ffffffffffff"])[0] == "partial: 21 of 25 trials have a result."
    assert "21 of 25 trials" in (made.path / "report.html").read_text()


def test_only_the_trials_asked_for_count(tmp_path):
    made = quickstart(tmp_path / "s")
    (headline,) = build(made.path, made.ids[:3])
    assert headline.startswith("sgd reaches test accuracy 0.95 in 310 steps at batch 32 (median of 3 seeds")


def test_nothing_yet(tmp_path):
    made = MadeStudy(tmp_path / "s")
    assert build(made.path, ["0" * 12]) == ["partial: 0 of 1 trials have a result."]
    assert figures(made.path) == []
    assert pyarrow.parquet.read_table(made.path / "results.parquet").num_rows == 0


def test_the_best_setting_is_chosen_and_named(tmp_path):
    made = MadeStudy(tmp_path / "s")
    for batch, best in {32: 0.1, 64: 0.2}.items():
        for rate in (0.1, 0.2, 0.4):
            for seed in range(3):
                steps = 6400 // batch if rate == best else math.inf if rate == 0.4 else 5 * 6400 // batch
                made.add("sgd", batch, seed, steps, point={"base.batch": batch, "base.rate.peak": rate})
    (headline,) = build(made.path)
    assert headline == (
        "sgd reaches test accuracy 0.95 in 200 steps at batch 32 and in 100 at batch 64 (2 x fewer steps for 2 x the batch; "
        "medians of 3 seeds, ranges 200 and 100); scaling stays within 20 % of perfect up to batch 64; best of 3 settings at "
        "each batch size."
    )
    text = (made.path / "report.md").read_text()
    assert "rate.peak 0.1" in text and "rate.peak 0.2" in text and "so it flatters" in text


def test_the_best_of_several_searches_was_chosen_on_the_seeds_reported(tmp_path):
    """A second axis of the grid: each of its values has a search and a winner, and these are compared on fresh seeds."""
    made = MadeStudy(tmp_path / "s")
    for momentum in (0.8, 0.9):
        for rate in (0.1, 0.2):
            point = {"base.batch": 32, "base.optimizer.sgd.momentum": momentum, "base.rate.peak": rate}
            made.add("sgd", 32, 0, 100 / rate, point=point, role="tuning")
        for seed in (1, 2):
            made.add("sgd", 32, seed, 300 * momentum, point=point, role="winner")
    (headline,) = build(made.path)
    assert "best of 4 settings at each batch size" in headline and "fresh seeds" not in headline
    text = (made.path / "report.md").read_text()
    assert "trained again with seeds" in text and "It was chosen on these same seeds, so it flatters" in text


def test_scaling_ends_at_a_batch_size_that_missed(tmp_path):
    made = MadeStudy(tmp_path / "s")
    for seed in range(3):
        for batch, steps in ((32, 320), (128, math.inf), (512, 20)):
            made.add("sgd", batch, seed, steps)
    (headline,) = build(made.path)
    assert "steps exceed perfect scaling by more than 20 % already at batch 128" in headline


def test_times_of_reused_trials_are_left_out(tmp_path):
    made = MadeStudy(tmp_path / "s")
    made.add("sgd", 32, 0, 100, reused=True)
    made.add("sgd", 32, 1, 200)
    made.add("sgd", 64, 0, 80, reused=True)
    build(made.path)
    text = (made.path / "report.md").read_text()
    assert "2 reused trials are left out: times are not carried over." in text
    row = next(line for line in text.splitlines() if line.startswith("| sgd | 32 |"))
    assert " 150 " in row and " 0.464 " in row  # both trials count in steps, the second one alone in seconds
    assert "Example CPU 2.0 GHz" in text and "2 workers with 1 thread each on cpu" in text


@pytest.mark.parametrize(
    "content, expected", [("{", "not JSON"), ("[]", "dict"), ('{"trial": "t", "arm": "a"}', "batch")]
)
def test_a_damaged_result_is_named(tmp_path, content, expected):
    made = MadeStudy(tmp_path / "s")
    trial = made.add("sgd", 32, 0, 100)
    (made.path / "trials" / trial / "result.json").write_text(content)
    with pytest.raises(Damaged, match=rf"{trial}.*{expected}"):
        build(made.path)
    assert not (made.path / "report.html").exists()


def test_no_study(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a study directory"):
        build(tmp_path)


def test_names_with_dollars_and_underscores_are_drawn_as_they_are(tmp_path):
    made = MadeStudy(tmp_path / "s", name="cost $x_1$")
    made.add(r"$\frac{", 32, 0, 100)
    build(made.path)
    root = ET.fromstring((made.path / "figures" / "steps_to_target.svg").read_bytes())
    assert r"$\frac{" in "".join(root.itertext())


def test_stretches_of_training_as_words() -> None:
    from orchestrator.report.wording import stretch

    assert [stretch(20.0, "epochs"), stretch(1, "steps"), stretch(0.004, "epochs")] == [
        "20 epochs",
        "1 step",
        "0.004 epochs",
    ]
