"""SIGUSR1 and SIGUSR2, which users and batch schedulers send: the second asks where a process stands, and ends nothing; the
first ends a study in order, as SIGTERM does, and a rank as the system does."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from orchestrator.signals import TERMINATED
from tests.faults import DRIVER
from tests.orchestrator.test_faults import GANG, SOLO, Broken, alone, broken_off, unbroken  # noqa: F401
from tests.orchestrator.test_study_on_ray import Running

pytestmark = pytest.mark.slow
STACK = "(most recent call first)"


def test_nobody_ends_when_asked_where_it_stands(tmp_path: Path, unbroken: Running) -> None:  # noqa: F811
    """Ranks before they have met, in a step, between two trials; the driver as it tells of a trial and as it commits."""
    study = Broken(tmp_path, GANG, 2)
    ranks = (("join", 1, None, None), ("step", 1, 12, 0), ("reset", 0, None, None), ("evaluate", 0, None, 1))
    driver = (("journal", DRIVER, 1, None), ("commit", DRIVER, 0, None))
    study.plant(*(("usr2", *where) for where in (*ranks, *driver)))
    code, err = study.run()
    assert code == 0 and study.all_fired(), err
    assert not study.last.events("worker_lost") and err.count(STACK) >= 1
    study.equals(unbroken)
    for seed, rank in ((0, 1), (1, 0)):
        log = study.last.study / "trials" / study.ids[seed] / "logs" / f"rank_{rank}.log"
        assert STACK in log.read_text()


def test_a_rank_that_another_signal_ends(tmp_path: Path, unbroken: Running) -> None:  # noqa: F811
    study = Broken(tmp_path, GANG, 1)
    study.plant(("usr1", "step", 1, 12, 0))
    code, err = study.run()
    assert code == 0 and study.all_fired() and err.count("a new gang goes on") == 1, err
    study.equals(unbroken)


def test_a_driver_that_a_batch_scheduler_ends(tmp_path: Path, unbroken: Running) -> None:  # noqa: F811
    """A batch scheduler that tells of the end in time."""
    study = Broken(tmp_path, GANG, 2)
    study.plant(("usr1", "commit", DRIVER, None, 0))
    broken_off(study, unbroken, TERMINATED)


def test_alone(tmp_path: Path, alone: Running) -> None:  # noqa: F811
    study = Broken(tmp_path, SOLO, 2)
    study.plant(("usr2", "evaluate", 0, None, 0), ("usr2", "commit", DRIVER, None, 0), ("usr1", "step", 0, 12, 1))
    broken_off(study, alone, TERMINATED)
