"""The network between two live ranks fails: connections close, or nothing arrives any more and nobody is told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from tests.faults import Fault, plant
from tests.orchestrator.fault_studies import Started
from tests.orchestrator.test_faults import GANG, Broken, trial_ids, unbroken  # noqa: F401
from tests.orchestrator.test_parity import TORCHRUN
from tests.orchestrator.test_study_on_ray import Running
from tests.waiting import AT_ONCE, until

pytestmark = pytest.mark.slow
LOSSES = (
    ("cut", "step", 1, 12, 0),
    ("cut", "backward", 0, 17, 1),
    ("cut", "evaluate", 1, None, 2),
    ("deaf", "step", 1, 12, 3),
    ("deaf", "all_reduce", 0, 20, 4),
    ("deaf", "evaluate", 0, None, 5),
)
LIMIT = 90.0  # seconds for the study, of which each silent loss costs cluster.timeout, 4


def test_ranks_of_a_gang(tmp_path: Path, unbroken: Running) -> None:  # noqa: F811
    """Each loss is the cluster's, charged once; a new gang goes on, to the same weights."""
    study = Broken(tmp_path, GANG, len(LOSSES))
    study.plant(*LOSSES)
    began = time.monotonic()
    code, err = study.run()
    assert code == 0, err
    assert study.all_fired() and time.monotonic() - began < LIMIT
    study.equals(unbroken)
    lost = study.last.events("worker_lost")
    assert [study.ids.index(event["trial"]) for event in lost] == list(range(len(LOSSES)))
    assert all("gloo" in event["reason"] for event in lost), lost
    assert err.count("a new gang goes on") == len(LOSSES) and "Traceback" not in err


def test_the_network_does_not_come_back(tmp_path: Path) -> None:
    """After `cluster.max_failures` retries the trial fails, in one line that tells why."""
    study = Broken(tmp_path, GANG, 1)
    study.plant(*(("cut", "step", rank, step, 0) for rank, step in ((1, 7), (0, 12), (1, 18))))
    code, err = study.run()
    assert code == 3 and study.all_fired(), err
    (told,) = [line for line in err.splitlines() if "FAILED" in line]
    assert "gloo" in told and "given up after 3 losses: cluster.max_failures is 2" in told and "Traceback" not in err


def test_ranks_of_torchrun(tmp_path: Path, unbroken: Running) -> None:  # noqa: F811
    """They form a new process group; no process is replaced."""
    ids = trial_ids(tmp_path)[: len(LOSSES)]
    planted = plant(tmp_path / "faults", [Fault(a, p, r, s, ids[seed]) for a, p, r, s, seed in LOSSES])
    study = Started(tmp_path, len(LOSSES), planted.env, [*TORCHRUN, "orchestrator"])
    code, err = study.end()
    assert code == 0, err
    assert planted.fired() == planted.faults
    until(lambda: not planted.left(), AT_ONCE)
    study.assert_equals(unbroken, ids)
    assert len(list(planted.folder.glob("rank.*"))) == 2
