"""Features of a trial's stages in the report: of the weights that were trained, seeded, and clear about what cannot be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.driver import drive
from orchestrator.files import Damaged
from orchestrator.recipe import load
from orchestrator.report import build, stage_features
from orchestrator.report.headlines import headlines
from orchestrator.report.load import load as load_study
from orchestrator.report.stage_features import _look, _network, _outputs, _trial, looked_at, measure
from orchestrator.report.summary import summarise
from orchestrator.store import Store
from orchestrator.study import Study
from orchestrator.workloads import DataError
from tests.orchestrator.made_study import MadeStudy

RECIPE = """
study: looked
workload: {data: digits, model: {plain_cnn: {stages: [C3 P, C1 P], width: 4}}}
engine: solo
cluster: {launcher: solo}
precision: fp32
base: {epochs: 0.2, batch: 32, rate: {peak: 0.05}}
strategies: [{stage_wise: {cache: exact}}]
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    (runs / "r.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.report.build", lambda study, trials=None: ["a headline"])
        assert drive(Study(load(runs / "r.yaml", []), RECIPE, runs)) == 0
    return runs / "looked"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_features, "TRAIN", 200)
    monkeypatch.setattr(stage_features, "TEST", 60)


def trial_of(study: Path) -> str:
    return Store(study).trial_ids()[0]


def test_the_network_is_the_one_that_was_trained(study: Path) -> None:
    trial = _trial(study, trial_of(study))
    net, data = _network(study, trial), stage_features._data(trial)
    test = data.test(0, data.test_examples)
    accuracy = (net.head(net.pool(net.stages[1](net.stages[0](test.x)))).argmax(1) == test.y).double().mean().item()
    assert accuracy == pytest.approx(Store(study).results()[0]["final"]["test_accuracy"], abs=1e-12)
    one, two = _outputs(net, test.x)
    assert one.shape == (360, 4 * 16) and two.shape == (360, 4 * 4)
    assert np.allclose(one, net.stages[0](test.x).detach().flatten(1).numpy(), atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_report_shows_what_was_measured_and_goes_on_showing_it(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study.parent, tmp_path / "runs")
    study = tmp_path / "runs" / "looked"
    path = measure(study, f"{trial_of(study)}:2")
    looked = json.loads(path.read_text())
    assert [(s["stage"], s["features"], len(s["points"])) for s in looked["stages"]] == [(2, 16, 60)]
    assert (looked["train"], len(looked["labels"])) == (200, 60)
    measure(study, trial_of(study))
    assert json.loads(path.read_text())["stages"][1] == looked["stages"][0]  # seeded
    build(study)
    text = (study / "report.md").read_text()
    assert (study / "figures" / "features.svg").exists()
    assert re.search(
        rf"\| {trial_of(study)} \| base \| 2 \| 16 \| {100 * looked['stages'][0]['accuracy']:.1f} % \|", text
    )
    path.write_text('{"trial": 1}')
    with pytest.raises(Damaged, match=r"features/.*measure it again"):
        looked_at(summarise(load_study(study, None)))


def test_separability_of_known_features() -> None:
    random, y = np.random.default_rng(0), np.arange(80) % 2
    apart = random.normal(size=(80, 300)).astype(np.float32)
    mixed = apart.copy()
    apart[:, 0] += 40 * y
    assert _look(1, apart[:40], y[:40], apart[40:], y[40:]).accuracy == 1.0
    look = _look(1, mixed[:40], y[:40], mixed[40:], y[40:])
    assert 0.2 < look.accuracy < 0.8 and look.features == 300 and np.isfinite(look.points).all()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("nothing", "no trial 'nothing'; there is "),
        ("{trial}:3", "expected a stage from 1 to 2"),
        ("{trial}:x", "expected a stage from 1 to 2"),
        ("../looked", "no trial"),
    ],
)
def test_what_cannot_be_looked_at_is_told(wanted: str, message: str, study: Path) -> None:
    with pytest.raises(DataError, match=message):
        measure(study, wanted.format(trial=trial_of(study)))


@pytest.mark.parametrize("change", ["phases", "import", "damaged"])
def test_a_trial_without_weights_or_network_is_told(change: str, study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "looked")
    path = tmp_path / "looked" / "trials" / trial_of(study) / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    if change == "import":
        config["workload"]["model"] = {"import": "evil:build"}
    path.write_text("[]" if change == "damaged" else json.dumps(config))
    expected = {"phases": "no weights of trial", "import": "your own code", "damaged": "not a trial as this version"}
    with pytest.raises((DataError, Damaged), match=expected[change]):
        measure(tmp_path / "looked", trial_of(study))


@pytest.mark.parametrize(
    ("epochs", "said"), [(None, "with a budget of 20 epochs for each part ("), ([1, 2], "at batch 32 (")]
)
def test_headlines_tell_whose_budget_it_is(epochs: list[int] | None, said: str, tmp_path: Path) -> None:
    made = MadeStudy(tmp_path, target=None)
    config = tmp_path / "trials" / made.add("parts", 32, 0) / "config.json"
    strategies = {"strategies": [["stage_wise", {"cuts": [1], "epochs": epochs}]]}
    config.write_text(json.dumps(json.loads(config.read_text()) | strategies))
    assert said in headlines(summarise(load_study(tmp_path, made.ids)))[0]
