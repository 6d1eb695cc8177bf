"""`precision: auto` is what pays where the workers train, and stays what it was when a study began."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from cluster.tasks import ClusterError
from orchestrator import precision
from orchestrator.driver import drive
from orchestrator.precision import auto
from orchestrator.recipe.schema import Cluster
from orchestrator.recipe.study_schema import Precision
from orchestrator.study import Changed
from tests.orchestrator.small_study import RECIPE, study

ONE = RECIPE.replace("seeds: 2", "seeds: 1")


@pytest.mark.parametrize(
    ("convolutional", "gpus", "workers", "gains", "found"),
    [
        (False, 1, 1, False, "bf16"),
        (False, 4, 2, False, "bf16"),
        (True, 0, 1, True, "bf16"),
        (False, 0, 1, True, "fp32"),
        (True, 0, 1, False, "fp32"),
        (True, 1, 2, False, "fp32"),  # both workers train on the CPU
        (True, 1, 2, True, "bf16"),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_bf16_on_gpus_and_where_convolutions_gain(
    monkeypatch: pytest.MonkeyPatch,
    convolutional: bool,
    gpus: int,
    workers: int,
    gains: bool,
    found: Precision,
    elsewhere: bool,
) -> None:
    """On this machine, or, whatever this machine has, on those of the user's cluster."""
    session = pytest.importorskip("cluster.session")
    monkeypatch.setattr(precision, "gpu_count", lambda: (0 if gpus else 8) if elsewhere else gpus)
    monkeypatch.setattr(precision, "bf16_pays", lambda: gains)
    monkeypatch.setattr(session, "connected", nullcontext)
    monkeypatch.setattr(session, "gpus_each", lambda n: int(gpus >= n))
    monkeypatch.setattr(session, "at_a_worker", lambda function, workers, threads: function())
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379" if elsewhere else "")
    assert auto(Cluster(workers=workers, launcher="gang"), convolutional) == found


def kept(runs: Path) -> str:
    return yaml.safe_load((runs / "small/resolved.yaml").read_text())["precision"]


@pytest.mark.usefixtures("no_report")
def test_a_study_goes_on_in_the_precision_it_began_with(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "precision" not in RECIPE
    monkeypatch.setattr("orchestrator.study.auto", lambda cluster, convolutional: "bf16")
    drive(study(runs, text=ONE))
    monkeypatch.setattr("orchestrator.study.auto", lambda cluster, convolutional: "fp32")
    more = study(runs, text=RECIPE)
    assert drive(more) == 0 and {trial.precision for trial in more.trials} == {"bf16"} and kept(runs) == "bf16"
    assert drive(study(runs, text=RECIPE + "precision: bf16\n")) == 0
    with pytest.raises(Changed, match=r"- precision: bf16\n\+ precision: fp32"):
        drive(study(runs, text=RECIPE + "precision: fp32\n"))
    afresh = study(runs, text=ONE)
    assert drive(afresh, fresh=True) == 0 and afresh.trials[0].precision == kept(runs) == "fp32"


@pytest.mark.usefixtures("no_report")
def test_a_study_of_an_older_kind_goes_on(runs: Path) -> None:
    """Its file says `auto` still."""
    drive(study(runs, text=ONE))
    path = runs / "small/resolved.yaml"
    path.write_text(path.read_text().replace("precision: fp32", "precision: auto"))
    assert drive(study(runs, text=ONE)) == 0 and kept(runs) == "fp32"


def test_where_no_cluster_answers_nothing_is_written(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        drive(study(runs, text=ONE.replace("solo", "gang")))
    assert [path.name for path in (runs / "small").iterdir()] == [".lock"]
