"""Studies on one process: what is run, what is not run again, what a changed recipe may change, who may write."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver import Driver, drive
from orchestrator.recipe import load
from orchestrator.report.load import load as load_study
from orchestrator.store import Busy, Store
from orchestrator.study import Changed, Study, differences
from tests.orchestrator.small_study import RECIPE, study


def events(runs: Path, name: str = "small") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (runs / name / "journal.jsonl").read_text().splitlines()]


def trained(runs: Path) -> list[str]:
    return [e["trial"] for e in events(runs) if e["event"] == "trial_started"]


def test_a_study_from_end_to_end(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert drive(study(runs)) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(runs / "small" / "report.html") and Path(out.strip()).exists()
    assert "sgd reaches test accuracy 0.5" in err
    results = Store(runs / "small").results()
    assert len(results) == 8 and {r["status"] for r in results} == {"done"}
    for result in results:
        rows = Store(runs / "small").rows(result)
        assert [r["step"] for r in rows] == sorted({r["step"] for r in rows})
        assert rows[-1]["step"] == result["steps"] and rows[-1]["test_accuracy"] == result["final"]["test_accuracy"]
        hit = result["target"]
        first = next((r for r in rows if r.get("test_accuracy", 0) >= 0.5), {})
        assert hit["reached"] == bool(first) and hit["step"] == first.get("step")
    status = json.loads((runs / "small/status.json").read_text())
    assert status["state"] == "done" and status["exit_code"] == 0 and status["trials"]["done"] == 8


def test_the_second_run_trains_nothing(runs: Path) -> None:
    drive(study(runs))
    before = trained(runs)
    page = (runs / "small/report.html").stat().st_mtime_ns
    assert drive(study(runs)) == 0
    assert trained(runs) == before
    assert (runs / "small/report.html").stat().st_mtime_ns == page


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("change", "new"),
    [
        ("seeds=3", 4),
        ("grid.base.batch=[128, 256, 512]", 4),
        ("arms.third={base: {rate: {peak: 0.1}}}", 4),
        ("base.epochs=3", 8),
        ("cluster.threads=2", 0),
        ("engine=solo", 0),
        ("workload.target={test_accuracy: 0.9}", 0),
    ],
)
def test_only_what_is_new_is_run(runs: Path, change: str, new: int) -> None:
    drive(study(runs))
    before = set(trained(runs))
    assert drive(study(runs, change)) == 0
    assert len(set(trained(runs)) - before) == new
    assert len(trained(runs)) == 8 + new


@pytest.mark.usefixtures("no_report")
def test_a_new_target_is_read_from_the_curves(runs: Path) -> None:
    drive(study(runs))
    drive(study(runs, "workload.target={test_accuracy: 0.3}"))
    for result in Store(runs / "small").results():
        rows = Store(runs / "small").rows(result)
        first = next((r for r in rows if r.get("test_accuracy", 0) >= 0.3), {})
        assert result["target"]["value"] == 0.3 and result["target"]["step"] == first.get("step")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("base.rate.peak=0.1", "- base.rate.peak: 0.2\n+ base.rate.peak: 0.1"),
        ("seeds=1", "- seeds: 2\n+ seeds: 1"),
        ("grid.base.batch=[128]", "- grid.base.batch: [128, 512]\n+ grid.base.batch: [128]"),
        ("base.epochs=1", "- base.epochs: 2"),
        ("workload.target.stop=true", "+ workload.target: {stop: true, test_accuracy: 0.5}"),
        ("engine={ddp: {compression: bf16}}", "- engine.compression.none: {}\n+ engine.compression.none: (absent)"),
        (
            "workload.model={mlp: {width: 32, depth: 2}}",
            "- workload.model.mlp.width: 16\n+ workload.model.mlp.width: 32",
        ),
        ("workload.evaluate.epochs=2", "- workload.evaluate.epochs: 1.0\n+ workload.evaluate.epochs: 2.0"),
    ],
)
def test_a_changed_recipe_is_refused_with_a_diff(runs: Path, change: str, said: str) -> None:
    study(runs).write_recipe()
    with pytest.raises(Changed) as error:
        study(runs, change).check_unchanged()
    assert said in str(error.value)


def test_an_arm_may_come_but_not_go() -> None:
    one, two = {"arms": {"a": {"base": {}}}}, {"arms": {"a": {"base": {}}, "b": {"base": {}}}}
    assert list(differences(one, two)) == []
    assert len(list(differences(two, one))) == 1


@pytest.mark.usefixtures("no_report")
def test_fresh_moves_the_old_study_aside(runs: Path) -> None:
    drive(study(runs))
    assert drive(study(runs, "base.rate.peak=0.1"), fresh=True) == 0
    assert len(Store(runs / "small.old1").results()) == 8
    assert len(trained(runs)) == 8


@pytest.mark.usefixtures("no_report")
def test_fresh_has_nothing_to_move_at_first(runs: Path) -> None:
    assert drive(study(runs), fresh=True) == 0
    assert [path.name for path in runs.iterdir() if path.name != ".phases"] == ["small"]


def test_who_waited_for_a_study_that_is_moved_aside_locks_the_new_one(runs: Path) -> None:
    """The lock that a second driver waits for moves away with the old study: it must not take it for the new one's."""
    store, taken = Store(runs / "small"), threading.Event()

    def second() -> None:
        with store.lock(wait=True):
            taken.set()

    waiting = threading.Thread(target=second, daemon=True)
    with store.lock():
        waiting.start()
        time.sleep(0.2)
        (runs / "small").rename(runs / "small.old1")
        aside = contextlib.ExitStack()
        aside.enter_context(store.lock())  # of the new study
    with aside:
        assert not taken.wait(0.3)
    assert taken.wait(5)


@pytest.mark.usefixtures("no_report")
def test_phases_are_shared_by_studies(runs: Path) -> None:
    """The same trials under another study's name: read from the phases on file, not trained again."""
    drive(study(runs))
    other = study(runs, text=RECIPE.replace("study: small", "study: other"))
    assert {t.id for t in other.trials} == {t.id for t in study(runs).trials}
    assert drive(other) == 0
    for result in Store(runs / "other").results():
        twin = Store(runs / "small").result(result["trial"])
        assert twin is not None and result["reused"] and not twin["reused"]
        assert result["final"] == twin["final"] and result["target"]["step"] == twin["target"]["step"]
        assert result["examples_per_second"] is result["seconds"]["train"] is result["target"]["seconds"] is None
        assert twin["seconds"]["train"] > 0
        assert result["parameters"] == twin["parameters"] > 0 and result["micro_batch"] == twin["micro_batch"] > 0


@pytest.mark.usefixtures("no_report")
def test_a_failing_trial_is_told_and_the_others_go_on(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = runs.parent / "own_network.py"
    code.write_text("def net(inputs, classes):\n    raise ValueError('planted in the network')\n")
    text = RECIPE.replace("{mlp: {width: 16, depth: 2}}", "{import: 'own_network:net'}")
    path = runs.parent / "recipe.yaml"
    path.write_text(text)
    sys.path.insert(0, str(runs.parent))
    try:
        failing = Study(load(path, allow_code=True), text, runs)
        assert drive(failing) == 3
        assert "planted in the network" in capsys.readouterr().err
        first = Store(runs / "small").results()[0]
        assert first["status"] == "failed" and "ValueError: planted in the network (own_network.py:2)" in first["error"]
        error = json.loads((runs / "small/trials" / first["trial"] / "error.json").read_text())
        assert error["kind"] == "ValueError" and error["rank"] == 0
        assert "planted" in (runs / "small/trials" / first["trial"] / "logs/rank_0.log").read_text()
        code.write_text("from torch import nn\ndef net(inputs, classes):\n"
                        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n")  # fmt: skip
        del sys.modules["own_network"]
        assert drive(failing) == 0  # what failed is tried again, and done trials are not
    finally:
        sys.path.remove(str(runs.parent))
        sys.modules.pop("own_network", None)


@pytest.mark.usefixtures("no_report")
def test_a_trial_is_on_file_before_the_next_one_is_trained(runs: Path) -> None:
    """Also on this process alone, where a trial that is cut short must not take the one before with it."""
    drive(study(runs))
    told = [e["event"] for e in events(runs)]
    assert told[1:5] == ["trial_started", "trial_started", "trial_ended", "trial_started"]
    files = [runs / "small/trials" / trial for trial in trained(runs)]
    for done, following in itertools.pairwise(files):
        assert done.joinpath("result.json").stat().st_mtime_ns < following.joinpath("metrics.jsonl").stat().st_mtime_ns


@pytest.mark.usefixtures("no_report")
def test_trials_of_an_earlier_form_of_the_recipe_are_no_part_of_the_study(runs: Path) -> None:
    drive(study(runs))
    drive(study(runs, "base.epochs=3"))
    now = [trial.id for trial in study(runs, "base.epochs=3").trials]
    assert Store(runs / "small").trial_ids() == now == [r["trial"] for r in Store(runs / "small").results()]


@pytest.mark.usefixtures("no_report")
def test_the_last_view_shows_the_end(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("orchestrator.driver.Progress.update", lambda view, status: seen.append(status))
    drive(study(runs))
    assert seen[-1]["state"] == "done" and seen[-1]["trials"]["done"] == 8 and seen[-1]["running"] == []


def test_a_sigterm_that_meets_rays_own_handler_is_an_interruption(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While Ray starts, its handler stands, which ends the process by SystemExit(15)."""
    monkeypatch.setattr("orchestrator.driver.Launcher.open", lambda launcher, trials: sys.exit(15))
    assert drive(study(runs)) == 75
    assert events(runs)[-1]["event"] == "study_ended" and Store(runs / "small").status()["state"] == "interrupted"


@pytest.mark.usefixtures("no_report")
def test_fail_fast(runs: Path) -> None:
    text = RECIPE.replace("{mlp: {width: 16, depth: 2}}", "{import: 'json:no_such_function'}")
    path = runs.parent / "recipe.yaml"
    path.write_text(text)
    assert drive(Study(load(path, allow_code=True), text, runs), fail_fast=True) == 3
    assert len(Store(runs / "small").results()) == 1
    trials = Store(runs / "small").status()["trials"]
    assert trials["failed"] == 1 and trials["left"] == trials["total"] - 1 == 7


def test_what_a_search_calls_for_after_a_failure_is_left_too(runs: Path) -> None:
    driver = Driver(study(runs), fail_fast=True)
    driver.counts["failed"] = 1
    before = driver.status()["trials"]
    driver._take(driver.waiting.pop().trial)
    assert len(driver.waiting) == 7 and driver.status()["trials"] == before


def test_a_reason_given_later_is_told_by_one_new_report(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, ...]] = []

    def build(directory: Path, trials: list[str]) -> list[str]:
        (directory / "report.html").touch()
        built.append(load_study(directory, trials).cautions)
        return list(built[-1])

    monkeypatch.setattr("orchestrator.report.build", build)
    text = RECIPE.replace("smooth: {strategies: [label_smoothing: {amount: 0.1}]}", "lars: {strategies: [lars]}")
    text = text.replace("[128, 512]", "[512]").replace("seeds: 2", "seeds: 1").replace("epochs: 2", "epochs: 1")
    assert drive(study(runs, text=text)) == 0
    assert len(built) == 1 and "W-UNFAIR" in built[0][0]
    reasoned = text + 'unfair: "one arm is all there is"\n'
    for _ in range(2):
        assert drive(study(runs, text=reasoned)) == 0
    assert len(built) == 2 and built[1] == ("Tuned unequally by intent: one arm is all there is",)
    assert len(trained(runs)) == 2


@pytest.mark.usefixtures("no_report")
def test_two_drivers_do_not_write_at_once(runs: Path) -> None:
    holder = f"""
import time
from pathlib import Path
from orchestrator.store import Store
with Store(Path({str(runs / "small")!r})).lock():
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(Busy, match=f"pid {process.pid}"):
            drive(study(runs))
        assert not (runs / "small/journal.jsonl").exists()
        process.kill()
        process.wait()
        assert drive(study(runs), wait=True) == 0  # the kernel frees a dead driver's lock
    finally:
        process.kill()


@pytest.mark.usefixtures("no_report")
def test_the_noisy_quadratic_gives_its_known_answer(runs: Path) -> None:
    """methods: steps to 1 % of the initial loss at the best rate of a grid; here at the rate that wins for each batch."""
    from orchestrator.workloads.noisy_quadratic import steps_to_target

    text = """
study: quadratic
workload:
  data: {noisy_quadratic: {dimension: 1000}}
  target: {test_loss: 0.05, stop: true}
  evaluate: {steps: 1}
cluster: {launcher: solo}
base: {optimizer: {sgd: {momentum: 0}}, steps: 3000, batch: 64, rate: {peak: 0.5}}
grid: {base.batch: [64, 256, 1024], base.rate.peak: [0.3, 1.0]}
"""
    assert drive(study(runs, text=text)) == 0
    for result in Store(runs / "quadratic").results():
        expected = steps_to_target(result["point"]["base.rate.peak"], result["batch"], 0.05, 1000)
        assert result["target"]["step"] == (expected if expected and expected <= 3000 else None)


@pytest.mark.usefixtures("no_report")
def test_status_tells_of_a_trial_while_it_runs_in_this_process(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.driver.TICK", 0.01)
    seen: list[dict[str, Any]] = []
    write = Store.write_status
    monkeypatch.setattr(Store, "write_status", lambda self, status: (seen.append(status), write(self, status)))
    assert drive(study(runs, "base.epochs=20", "seeds=1", "log_steps=5")) == 0
    told = [trial for status in seen for trial in status["running"] if trial["train_loss"] is not None]
    assert {trial["arm"] for trial in told} == {"sgd", "smooth"}
    assert any(trial["test_accuracy"] is not None and trial["examples_per_second"] > 0 for trial in told)


@pytest.mark.usefixtures("no_report")
def test_a_missing_module_is_told_before_any_trial(runs: Path) -> None:
    from strategies.contract import PlanError

    path = runs.parent / "recipe.yaml"
    text = RECIPE.replace("{mlp: {width: 16, depth: 2}}", "{import: 'no_such.module:net'}")
    path.write_text(text)
    with pytest.raises(PlanError, match="no module named"):
        drive(Study(load(path, allow_code=True), text, runs))
    assert not (runs / "small" / "journal.jsonl").exists()
