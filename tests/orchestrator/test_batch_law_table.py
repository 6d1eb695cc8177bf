"""Reading curves from files and studies, and the command `bigbatch fit`: what it prints, and what it says of bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.batch_law.law import Law, Point
from orchestrator.batch_law.table import read
from orchestrator.cli import app
from orchestrator.files import Damaged
from tests.orchestrator.batch_law_curves import PUBLIC, made
from tests.orchestrator.made_study import EXAMPLES, MadeStudy


def bigbatch_fit(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["fit", *words])
    return done.exit_code, done.stdout, done.stderr


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


CURVE = {"quantity": "steps_to_target", "points": [{"batch_size": 8, "to_target": [30, 40]}]}


# -------------------------------------------------------------------------------------------------------------- the table


def test_table_of_the_public_curves():
    code, out, err = bigbatch_fit(str(PUBLIC))
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 10)
    columns = [lines[0].index(word) for word in ("curve", "E_min", "S_min", "B_crit", "rms")]
    resnet = [lines[1][a:b].strip() for a, b in zip(columns, [*columns[1:], None], strict=True)]
    assert resnet[0].split() == ["resnet50_lars", "1632-67840", "10", "130"]
    assert resnet[1].startswith("34.7 epochs [32.") and resnet[2].startswith("944 [") and resnet[4] == "0.037"
    assert resnet[3].startswith("47039 [41")
    assert lines[3].split()[0] == "ssd" and lines[3][columns[2] : columns[3]].strip() == "-"


def test_json_of_the_public_curves():
    code, out, _ = bigbatch_fit(str(PUBLIC), "--json")
    data = {one["curve"]: one for one in json.loads(out)}
    assert code == 0 and len(data) == 8
    lm = data["lm_85M"]
    assert lm["identified"] is True and lm["bound"] is None and lm["reasons"] == [] and lm["misses"] == 0
    assert lm["critical"]["low"] < lm["critical"]["value"] < lm["critical"]["high"]
    assert lm["examples_min"]["value"] == pytest.approx(lm["steps_min"]["value"] * lm["critical"]["value"])
    assert set(lm["intervals"]) == {"profile", "points"}
    slopes = [stretch["slope"] for stretch in lm["regimes"]]
    assert slopes[0] == pytest.approx(1.0) and slopes[-1] == 0
    assert [lm["regimes"][i]["regime"] for i in (0, -1)] == ["perfect", "maximal data parallelism"]
    assert data["gpt3"]["steps_min"] == {"value": None, "low": None, "high": None}


def test_an_unidentified_critical_batch_size_is_a_bound(tmp_path):
    points = made(0, Law(1e-3, 1e9), [2.0**i for i in range(8)], noise=0.2)
    rows = "".join(f"{p.batch},{p.upper}\n" for p in points)
    path = written(tmp_path / "flat.csv", "batch_size,steps_to_target\n" + rows)
    _, out, _ = bigbatch_fit(str(path))
    assert "at least" in out and "flat: B_crit is not identified: the largest batch size is below half of it" in out
    (data,) = json.loads(bigbatch_fit(str(path), "--json")[1])
    assert data["identified"] is False and data["critical"]["value"] is data["critical"]["high"] is None
    assert data["bound"] == {"at_least": data["critical"]["low"]}
    assert data["steps_min"]["low"] is data["steps_min"]["value"] is None


def test_too_few_batch_sizes_are_said_to_be_too_few(tmp_path):
    path = written(tmp_path / "a.json", {"a": CURVE})
    code, out, _ = bigbatch_fit(str(path))
    assert code == 0 and "a: B_crit is not identified: the target was reached at fewer than 3 batch sizes" in out


# ---------------------------------------------------------------------------------------------------------------- reading


def test_json_with_intervals_misses_and_single_values(tmp_path):
    rows = [
        {"batch_size": 8, "to_target": [40, 50], "lower": [30, 40], "reached": [True, False]},
        {"batch_size": 16, "to_target": 20},
    ]
    (curve,) = read(written(tmp_path / "a.json", {"a": {"quantity": "steps_to_target", "points": rows}}))
    assert curve.points == [Point(8, 30, 40), Point(8, 50, math.inf), Point(16, 20, 20)]


def test_examples_become_steps(tmp_path):
    curve = {"quantity": "examples_to_target", "unit": "epochs", "points": [{"batch_size": 8, "to_target": [40]}]}
    (found,) = read(written(tmp_path / "a.json", {"a": curve}))
    assert found.points == [Point(8, 5, 5)] and found.unit == "epochs"


def test_csv_with_all_columns(tmp_path):
    text = "\ufeffcurve, batch_size, steps_to_target, lower, reached, note\nb,8,40,30,true,x\na,8,50,,no,\nb,16,20,,,\n"
    curves = read(written(tmp_path / "t.csv", text))
    assert [(c.name, c.points) for c in curves] == [
        ("b", [Point(8, 30, 40), Point(16, 20, 20)]),
        ("a", [Point(8, 50, math.inf)]),
    ]


def test_json_and_csv_of_the_same_table_agree(tmp_path):
    points = made(0)
    rows = "".join(f"{p.batch},{p.upper!r}\n" for p in points)
    batches = sorted({p.batch for p in points})
    listed = [{"batch_size": b, "to_target": [p.upper for p in points if p.batch == b]} for b in batches]
    as_csv = read(written(tmp_path / "t.csv", "batch_size,steps_to_target\n" + rows))
    as_json = read(written(tmp_path / "t.json", {"t": {"quantity": "steps_to_target", "points": listed}}))
    assert as_csv == as_json


def changed(**changes: object) -> dict[str, object]:
    return {"a": {**CURVE, **changes}}


BAD_JSON = {
    "not json": ("{", "not JSON"),
    "a list": ([1], "expected an object of curves"),
    "quantity": (
        changed(quantity="steps"),
        "a: quantity: Input should be 'steps_to_target' or 'examples_to_target', got 'steps'",
    ),
    "points": ({"a": {"quantity": "steps_to_target"}}, "a: points: Field required"),
    "no points": (changed(points=[]), "a: points: List should have at least 1 item"),
    "no curves": ({}, "expected an object of curves"),
    "zero": (
        changed(points=[{"batch_size": 8, "to_target": [1, 0]}]),
        "a: points[0].to_target[1]: Input should be greater than 0",
    ),
    "null": (
        changed(points=[{"batch_size": 8, "to_target": [None]}]),
        "a: points[0].to_target[0]: Input should be a valid number",
    ),
    "lower": (
        changed(points=[{"batch_size": 8, "to_target": 3, "lower": 3}]),
        "a: points[0]: lower must be below to_target",
    ),
    "lengths": (
        changed(points=[{"batch_size": 8, "to_target": [3, 4], "reached": True}]),
        "reached has 1 values, to_target 2",
    ),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_one_line(tmp_path, case):
    content, message = BAD_JSON[case]
    path = written(tmp_path / "a.json", content)
    code, out, err = bigbatch_fit(str(path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(str(path)) and message in err


BAD_CSV = {
    "": (":1: expected the columns batch_size and one of steps_to_target", "got nothing"),
    "batch,steps\n8,3\n": (":1: expected the columns", "got batch, steps"),
    "batch_size,steps_to_target,epochs_to_target\n": (":1: expected the columns", "one of"),
    "batch_size,steps_to_target\n": (": no rows below the columns", ""),
    "batch_size,steps_to_target\n8,30\n16,x\n": (":3: to_target[0]: Input should be a valid number", "got 'x'"),
    "batch_size,steps_to_target\n8,30\n\n16\n": (":4: to_target: Field required", ""),
    "batch_size,steps_to_target\n8,inf\n": (":2: to_target[0]: Input should be a finite number", ""),
    "batch_size,steps_to_target,reached\n8,3,perhaps\n": (
        ":2: reached[0]: Input should be a valid boolean",
        "got 'perhaps'",
    ),
}


@pytest.mark.parametrize("text", BAD_CSV, ids=repr)
def test_bad_csv_names_its_line(tmp_path, text):
    path = written(tmp_path / "a.csv", text)
    code, out, err = bigbatch_fit(str(path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(str(path)) and all(part in err for part in BAD_CSV[text])


def test_files_that_are_none(tmp_path):
    for path in (tmp_path / "no.csv", tmp_path):
        code, _, err = bigbatch_fit(str(path))
        assert code == 2 and err.count("\n") == 1 and str(path) in err
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Damaged, match="not UTF-8"):
        read(tmp_path / "binary.csv")


# ----------------------------------------------------------------------------------------------------------------- studies


def test_a_study_gives_a_curve_per_arm_with_its_evaluation_intervals(tmp_path):
    study = MadeStudy(tmp_path / "s")
    before, hit, last = (math.ceil(epochs * EXAMPLES / 64) for epochs in (1.5, 2, 20))  # evaluated every half epoch
    study.add("sgd", 64, 0, hit)
    study.add("sgd", 64, 1)
    study.add("adamw", 64, 0, hit)
    study.add("adamw", 128, 0, 3, status="failed")
    sgd, adamw = read(study.path)
    assert (sgd.name, sgd.points) == ("sgd", [Point(64, before, hit), Point(64, last, math.inf)])
    assert (adamw.name, len(adamw.points)) == ("adamw", 1)


def test_a_hit_at_the_first_evaluation_has_no_lower_bound_but_none(tmp_path):
    study = MadeStudy(tmp_path / "s")
    trial = study.add("sgd", 64, 0, 10)
    assert read(study.path)[0].points == [Point(64, 0, 10)]
    (study.path / "trials" / trial / "metrics.jsonl").unlink()
    assert read(study.path)[0].points == [Point(64, 10, 10)]


def test_of_other_grid_values_the_best_counts(tmp_path):
    study = MadeStudy(tmp_path / "s")
    for rate, steps in ((0.1, 400), (0.2, 300)):
        study.add("sgd", 64, 0, steps, point={"base.batch": 64, "base.rate": rate})
    (curve,) = read(study.path)
    assert [p.upper for p in curve.points] == [300]


def test_trials_that_are_no_longer_in_the_study_do_not_count(tmp_path):
    study = MadeStudy(tmp_path / "s")
    for batch in (16, 64, 256):
        study.add("sgd", batch, 0, 6400 // batch + 20)
    before = bigbatch_fit(str(study.path), "--json")
    (study.path / "trials.json").write_text(json.dumps(study.ids))
    for batch in (16, 64, 256):
        study.add("sgd", batch, 0, 2 * (6400 // batch + 20))
    assert before[0] == 0 and bigbatch_fit(str(study.path), "--json") == before


def test_an_arm_whose_search_has_no_winner_yet_does_not_hide_the_others(tmp_path):
    study = MadeStudy(tmp_path / "s")
    for batch in (32, 64, 128, 256):
        study.add("sgd", batch, 0, round(Law(20, 200).steps(batch)))
        study.add("adamw", batch, 0, 100, role="tuning")
    code, out, _ = bigbatch_fit(str(study.path))
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and rows["sgd"].split()[1] == "32-256"
    assert "the target was reached at fewer than 3 batch sizes" in rows["adamw:"]


def test_a_study_without_target_is_refused(tmp_path):
    study = MadeStudy(tmp_path / "s", target=None)
    study.add("sgd", 64, 0)
    code, _, err = bigbatch_fit(str(study.path))
    assert code == 2 and err == f"{study.path}: this study has no target, so there are no steps to target to fit\n"


def test_the_law_of_a_study_is_found_again(tmp_path):
    study, law = MadeStudy(tmp_path / "s"), Law(20, 200)
    for batch in (16, 32, 64, 128, 256, 512, 1024):
        for seed in range(3):
            study.add("sgd", batch, seed, round(law.steps(batch) * (1, 0.95, 1.05)[seed]))
    (data,) = json.loads(bigbatch_fit(str(study.path), "--json")[1])
    assert data["identified"] and data["curve"] == "sgd" and data["trials"] == 21
    assert data["critical"]["low"] < 200 < data["critical"]["high"]
    assert data["steps_min"]["low"] < 20 < data["steps_min"]["high"]
