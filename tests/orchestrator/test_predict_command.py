"""`bigbatch predict`: the table, JSON, hardware files, and what it says of bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.batch_law.law import Law
from orchestrator.cli import app
from orchestrator.predict.hardware import PRESETS, Link, load
from orchestrator.predict.step_time import step_seconds
from orchestrator.recipe.problems import RecipeError
from tests.orchestrator.predict_studies import COMPUTE, LAW, NETWORK, PARAMETERS, step_of, study

HARDWARE = """\
name: cluster
network: {latency: 20e-6, bandwidth: 10e9}
node: {workers: 8, latency: 3e-6, bandwidth: 300e9}
algorithm: hierarchical
price: 2.5
"""


def predict(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["predict", *map(str, words)])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study(tmp_path_factory.mktemp("command") / "study")


@pytest.fixture
def hardware(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(HARDWARE)
    return path


def test_table_and_inputs(made, hardware):
    code, out, err = predict(made, "--workers", "8,64", "--batch", "512,1024", "--hardware", hardware)
    assert (code, err) == (0, "")
    title, _, header, *lines = out.splitlines()
    assert title == "arm sgd on cluster" and "cost" in header and "device time" not in header
    rows = lines[: lines.index("")]
    assert [row.split()[:3] for row in rows] == [
        ["8", "512", "64"],
        ["8", "1024", "128"],
        ["64", "512", "8"],
        ["64", "1024", "16"],
    ]
    at = header.index("steps")
    assert all(row[at - 1] == " " != row[at] for row in rows)  # aligned
    assert sum("fastest" in row for row in rows) >= 1 and sum("cheapest" in row for row in rows) >= 1
    inputs = {line.split("  ")[0]: line for line in lines[len(rows) + 2 :]}
    sources = {name: next(w for w in line.split("  ")[1:] if w).strip() for name, line in inputs.items()}
    assert sources["law of steps"] == sources["a pass over a micro-batch"] == sources["gradient"] == "measured"
    assert (
        sources["cluster: latency"] == sources["cluster: bandwidth"] == sources["price of a worker's hour"] == "stated"
    )
    assert sources["jitter"] == sources["backward pass"] == sources["buckets are ready"] == "assumed"
    assert "uncalibrated beyond 1 worker" in inputs["error of scaling"]


def test_a_preset_is_called_one_and_the_default_is_named(made):
    _, out, _ = predict(made, "--workers", "8", "--batch", "512")
    assert out.startswith("arm sgd on ethernet_10g\n") and "device time" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("ethernet_10g:")]
    assert [line[2] for line in lines] == ["preset", "preset"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_predicts(made, name):
    code, out, _ = predict(made, "--workers", "1,16", "--batch", "1024", "--hardware", name)
    assert code == 0 and out.startswith(f"arm sgd on {name}\n")


def test_loopback_is_measured_by_studies_of_one_and_two_workers(made, tmp_path):
    two = study(tmp_path / "two", workers=2)
    _, out, _ = predict(made, two, "--workers", "2", "--batch", "512", "--hardware", "loopback")
    assert any(line.startswith("loopback: bandwidth") and "measured" in line for line in out.splitlines())
    assert "backtested on this study" in out and "uncalibrated" not in out
    _, out, _ = predict(made, "--workers", "2", "--batch", "512", "--hardware", "loopback")
    assert any(line.startswith("loopback: bandwidth") and " preset " in line for line in out.splitlines())
    assert "uncalibrated" in out


def test_json(made, hardware):
    code, out, _ = predict(made, "--workers", "8", "--hardware", hardware, "--json")
    (data,) = json.loads(out)
    assert code == 0 and data["identified"] and data["critical"] == pytest.approx(LAW.critical, rel=0.1)
    assert [row["batch"] for row in data["rows"]] == [32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
    for row in data["rows"]:
        assert row["seconds"]["low"] < row["seconds"]["value"] < row["seconds"]["high"]
        assert row["seconds"]["value"] == pytest.approx(row["steps"]["value"] * row["step_seconds"]["value"])
        assert row["cost"]["value"] == pytest.approx(8 * row["seconds"]["value"] / 3600 * 2.5)
        assert row["speed_up"] == pytest.approx(8 * row["statistical_efficiency"] * row["hardware_efficiency"])
    assert set(data["optima"]) == {"fastest", "cheapest", "fastest_within_1.2x_of_cheapest"}
    assert {one["source"] for one in data["inputs"]} >= {"measured", "stated", "assumed"}


@pytest.mark.parametrize("bandwidth", [2e8, 2e9, 1e10])
def test_trials_on_two_workers_alone_tell_of_two_workers_alone(tmp_path, bandwidth):
    """Traffic that nothing tells from computing is in the step; accumulated, it comes once a step or once a pass."""
    network = NETWORK.model_copy(update={"network": Link(latency=1e-4, bandwidth=bandwidth)})
    path = study(tmp_path / "two", workers=2, seeds=1, network=network)
    for words in (["1,8", "--batch", "512"], ["2"], ["1", "--hardware", "loopback"]):
        code, out, err = predict(path, "--workers", *words)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and "add a study on 1 worker" in err
    code, out, _ = predict(path, "--workers", "2", "--hardware", "loopback", "--json")
    (data,) = json.loads(out, parse_constant=pytest.fail)
    for row in data["rows"]:
        actual = step_seconds(COMPUTE, network, 4 * PARAMETERS, step_of(2, row["batch"], 512))
        assert row["step_seconds"]["low"] < actual < row["step_seconds"]["high"]
        assert (row["hardware_efficiency"], row["speed_up"]) == (None, None)
    told = {one["name"]: (one["source"], one["value"]) for one in data["inputs"]}
    assert told["traffic"][0] == "assumed" and "no trial ran on 1 worker" in told["traffic"][1]
    assert "traffic included" in told["a pass over a micro-batch"][1] and "loopback: bandwidth" not in told


def test_the_same_command_gives_the_same_numbers(made):
    words = (made, "--workers", "8,64", "--json")
    assert predict(*words) == predict(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "8,x"], "--workers: expected whole numbers from 1"),
        (["--workers", "0"], "--workers: expected whole numbers from 1"),
        (["--workers", "8", "--batch", "1.5"], "--batch: expected whole numbers from 1"),
        (["--workers", "8", "--arm", "sdg"], "no arm 'sdg', did you mean \"sgd\"?"),
        (["--workers", "8", "--hardware", "ethernet_10"], 'neither a file nor a preset, did you mean "ethernet_10g"?'),
        (["--workers", "8", "--batch", "512,20000"], "batch size 20000 is more than 16 times the largest"),
        (["--workers", "64", "--batch", "32"], "an example for each of 64 workers"),
    ],
)
def test_what_a_user_did_wrong_is_one_line(made, words, message):
    code, out, err = predict(made, *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_a_bound_is_called_one(tmp_path):
    path = study(tmp_path / "bound", law=Law(steps_min=40, critical=4000))
    code, out, _ = predict(path, "--workers", "8", "--batch", "1024")
    (line,) = (line for line in out.splitlines() if line.startswith("law of steps"))
    assert code == 0 and "measured bound" in line and "B_crit at least" in line
    assert "not identified: the largest batch size is below half of it" in line


def test_force_predicts_beyond(made):
    code, out, _ = predict(made, "--workers", "8", "--batch", "20000", "--force")
    assert code == 0 and "20000" in out


def test_no_study_and_no_target(tmp_path):
    code, _, err = predict(tmp_path, "--workers", "8")
    assert code == 2 and err == f"{tmp_path}: not a study directory (it has no trials/)\n"
    without = study(tmp_path / "without", batches=(32, 64), seeds=1, target=None)
    code, _, err = predict(without, "--workers", "8")
    assert code == 2 and err == f"{without}: this study has no target, so there is no time to it to predict\n"


def test_trials_that_are_no_longer_in_the_study_do_not_count(made, tmp_path):
    path = tmp_path / "study"
    shutil.copytree(made, path)
    words = (path, "--workers", 4, "--batch", 256, "--json")
    trials = sorted((path / "trials").iterdir())
    before = predict(*words)
    (path / "trials.json").write_text(json.dumps([trial.name for trial in trials]))
    for trial in trials:
        shutil.copytree(trial, stale := trial.with_name(f"stale_{trial.name}"))
        result = json.loads((stale / "result.json").read_text())
        result["target"]["step"] *= 2
        result["examples_per_second"] /= 2
        (stale / "result.json").write_text(json.dumps(result))
    assert before[0] == 0 and predict(*words) == before


def test_an_arm_that_cannot_be_predicted_does_not_hide_the_others(tmp_path):
    path = study(tmp_path / "arms")
    kept = study(tmp_path / "few", batches=(32, 64), arm="lars")
    for trial in kept.glob("trials/*"):
        trial.rename(path / "trials" / f"lars{trial.name}")
    code, out, err = predict(path, "--workers", "8", "--batch", "512")
    assert code == 0 and out.startswith("arm sgd") and "lars" not in out
    assert len(err.splitlines()) == 1 and "arm lars: the target was reached at fewer than three batch sizes" in err


def test_an_arm_whose_search_has_no_winner_yet_does_not_hide_the_others(tmp_path):
    path = study(tmp_path / "arms")
    tuning = study(tmp_path / "tuning", arm="adamw", role="tuning")
    for trial in tuning.glob("trials/*"):
        trial.rename(path / "trials" / f"adamw{trial.name}")
    code, out, err = predict(path, "--workers", "8", "--batch", "512")
    assert code == 0 and out.startswith("arm sgd") and "adamw" not in out
    assert len(err.splitlines()) == 1 and "arm adamw: the target was reached at fewer than three batch sizes" in err


# ---------------------------------------------------------------------------------------------------------- hardware files


def test_hardware_file_as_written(hardware):
    read = load(hardware)
    assert read.node and (read.network.latency, read.network.bandwidth, read.node.workers) == (20e-6, 10e9, 8)
    assert (read.price, read.jitter, read.reduction) == (2.5, 0.02, 0)


def test_every_mistake_of_a_hardware_file_with_its_place(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: c\nnetwork: {latency: -1, bandwith: 1e9}\nalgorithm: rings\nprice: 2 dollars\n")
    with pytest.raises(RecipeError) as caught:
        load(path)
    lines = str(caught.value).removeprefix(f"{path}:").split(f"\n{path}:")
    assert sorted(line.split(" ")[0] for line in lines) == ["2:10:", "2:20:", "2:24:", "3:12:", "4:8:"]
    text = "\n".join(lines)
    assert 'unknown key, did you mean "bandwidth"?' in text and 'did you mean "ring"?' in text
    assert "network.latency: expected >= 0, got -1" in text


@pytest.mark.parametrize("content", ["", "[1]", "name: [", "a: &a [*a]", "\xff"])
def test_what_is_no_hardware_file(made, tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode("latin-1"))
    code, out, err = predict(made, "--workers", "8", "--hardware", path)
    assert (code, out, len(err.splitlines())) == (2, "", 1) and err.startswith(f"{path}:")


def test_a_forecast_needs_neither_torch_nor_ray(made):
    program = (
        "import sys; from orchestrator.predict.command import predict; from pathlib import Path; "
        f"predict([Path({str(made)!r})], '8'); print([m for m in ('torch', 'ray', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
