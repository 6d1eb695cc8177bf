"""Moments of the matrix beside those in trials: gangs that form, wait for the next trial or have their driver stopped; each
line of the journal; a clock that is set back; a host whose name leads nowhere."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from tests.faults import DRIVER, Fault, plant
from tests.orchestrator.fault_studies import Started
from tests.orchestrator.test_faults import (
    GANG,
    SOLO,
    Broken,
    alone,  # noqa: F401
    broken_off,
    start,
    trial_ids,
    unbroken,  # noqa: F401
)
from tests.orchestrator.test_parity import TORCHRUN
from tests.orchestrator.test_study_on_ray import Running
from tests.waiting import AT_ONCE, until

pytestmark = pytest.mark.slow
TIMEOUT = 4.0  # seconds, of GANG


GANG_MOMENTS = [
    ("kill", "bind", 0),
    ("stop", "bind", 0),
    ("kill", "join", 0),
    ("stop", "join", 0),
    ("kill", "reset", 0),
    ("kill", "reset", 1),
    ("term", "reset", 1),
    ("stop", "reset", 1),
]


@pytest.mark.parametrize(("action", "place", "rank"), GANG_MOMENTS)
def test_a_gang_that_forms_or_waits(
    tmp_path: Path,
    unbroken: Running,  # noqa: F811
    action: str,
    place: str,
    rank: int,
) -> None:
    """At `reset`, a trial is over and the next one on its way."""
    study = Broken(tmp_path, GANG, 2)
    study.plant((action, place, rank, None, None))
    code, err = study.run()
    assert code == 0 and study.all_fired(), err
    assert len(study.last.events("worker_lost")) == 1 or action == "term"  # which lets the rank end what it is at
    study.equals(unbroken)


@pytest.mark.parametrize(("action", "rank"), [("stop", 1), ("hang", 1), ("usr1", 0)])
def test_a_rank_of_torchrun_that_does_not_get_on(
    tmp_path: Path,
    unbroken: Running,  # noqa: F811
    action: str,
    rank: int,
) -> None:
    """Nobody but torchrun could replace it: all ends within the time limit, and the same command goes on."""
    ids, torchrun = trial_ids(tmp_path)[:1], [*TORCHRUN, "orchestrator"]
    planted = plant(tmp_path / "faults", [Fault(action, "step", rank, 12, ids[0])])
    code, err = Started(tmp_path, 1, planted.env, torchrun).end()
    assert code == 1 and planted.fired() == planted.faults and "the same command goes on" in err, err
    until(lambda: not planted.left(), AT_ONCE)
    study = Started(tmp_path, 1, planted.env, torchrun)
    code, err = study.end()
    assert code == 0, err
    study.assert_equals(unbroken, ids)


def test_a_driver_that_was_stopped_takes_nobody_for_lost(tmp_path: Path, unbroken: Running) -> None:  # noqa: F811
    study = Broken(tmp_path, GANG, 3)
    planted = study.plant(("stop", "commit", DRIVER, None, 0))
    study.last = start(tmp_path, GANG, 3, planted.env)
    until(study.all_fired)
    time.sleep(2 * TIMEOUT)
    study.last.process.send_signal(signal.SIGCONT)
    code, err = study.last.end()
    assert code == 0, err
    assert not study.last.events("worker_lost")
    study.equals(unbroken)


@pytest.mark.parametrize("call", range(6))
def test_a_driver_is_killed_at_each_line_of_the_journal(tmp_path: Path, alone: Running, call: int) -> None:  # noqa: F811
    """Of the study, its two trials, and its end."""
    study = Broken(tmp_path, SOLO, 2)
    study.plant(("kill", "journal", DRIVER, call, None))
    broken_off(study, alone, -signal.SIGKILL)


@pytest.mark.parametrize(("place", "call"), [("commit", 1), ("replace", 10), ("row", 10)])
def test_a_disk_that_fails(tmp_path: Path, alone: Running, place: str, call: int) -> None:  # noqa: F811
    """EIO, in the driver's own files and in a trial."""
    study = Broken(tmp_path, SOLO, 2)
    study.plant(("io", place, DRIVER if place == "commit" else 0, call, None if place == "commit" else 1))
    code, err = study.run()
    assert code == (2 if place == "commit" else 3) and study.all_fired()
    assert err.count("Input/output error") == 1 and "Traceback" not in err, err
    code, err = study.run()
    assert code == 0, err
    study.equals(alone)


def test_a_clock_that_is_set_back(tmp_path: Path, unbroken: Running) -> None:  # noqa: F811
    """By an hour, on a rank in a step, then in the driver: nobody is taken for silent or late."""
    study = Broken(tmp_path, GANG, 3)
    study.plant(("clock", "step", 1, 12, 0), ("clock", "step", 0, 15, 1), ("clock", "commit", DRIVER, None, 0))
    code, err = study.run()
    assert code == 0 and study.all_fired(), err
    assert not study.last.events("worker_lost")
    study.equals(unbroken)
    times = [json.loads(line)["time"] for line in (study.last.study / "journal.jsonl").read_text().splitlines()]
    assert min(times[1:]) < times[0] - 3000


def test_a_host_whose_name_leads_nowhere(tmp_path: Path, unbroken: Running) -> None:  # noqa: F811
    """Workers on one machine talk through loopback, whatever it is called."""
    inside = ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this user cannot rename a host of its own")
    ids = trial_ids(tmp_path)[:1]
    study = Started(tmp_path, 1, {}, [*inside, sys.executable, "-m", "orchestrator"])
    code, err = study.end()
    assert code == 0, err
    study.assert_equals(unbroken, ids)
