"""Faults under DeepSpeed's ZeRO 1, whose optimizer state is spread: what a lost rank held is in the checkpoint."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from tests.faults import Fault, plant
from tests.orchestrator.fault_studies import Started
from tests.orchestrator.test_faults import GANG, Broken, start, trial_ids
from tests.orchestrator.test_parity import TORCHRUN
from tests.orchestrator.test_study_on_ray import Running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed"),
]
ZERO = ("--set", "engine={deepspeed: {stage: 1}}")
MOMENTS = (
    ("kill", "step", 0, 7, 0),
    ("kill", "backward", 1, 12, 1),
    ("kill", "apply", 1, 17, 2),
    ("kill", "gather", 1, 20, 3),  # while rank 0 waits for this one's part of the checkpoint
    ("kill", "fsync", 0, 10, 4),
    ("kill", "evaluate", 1, None, 5),
    ("hang", "backward", 1, 12, 6),
    ("deaf", "apply", 1, 12, 7),
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Running:
    folder = tmp_path_factory.mktemp("unbroken")
    study = start(folder, GANG, len(MOMENTS), plant(folder / "faults").env, ZERO)
    code, err = study.end()
    assert code == 0, err
    return study


def test_lost_ranks(tmp_path: Path, unbroken: Running) -> None:
    study = Broken(tmp_path, GANG, len(MOMENTS))
    study.plant(*MOMENTS)
    code, err = study.run(ZERO)
    assert code == 0, err
    assert study.all_fired()
    study.equals(unbroken)
    lost = study.last.events("worker_lost")
    assert [study.ids.index(event["trial"]) for event in lost] == list(range(len(MOMENTS)))
    assert {study.ids.index(e["trial"]): e["rank"] for e in lost} == {
        seed: rank for action, _, rank, _, seed in MOMENTS
    }
    assert err.count("a new gang goes on") == len(MOMENTS)


CUTS = (("cut", "backward", 1, 12, 0), ("cut", "apply", 0, 17, 1), ("cut", "gather", 1, 20, 2))


def test_ranks_of_torchrun_that_lose_each_other(tmp_path: Path) -> None:
    """The same processes form a new group, in which DeepSpeed begins anew; the weights are those of ranks that did not."""
    ended = {}
    for name, faults in (("unbroken", ()), ("broken", CUTS)):
        ids = trial_ids(tmp_path / name)[: len(CUTS)]
        planted = plant(tmp_path / name / "faults", [Fault(a, p, r, s, ids[seed]) for a, p, r, s, seed in faults])
        command = [*TORCHRUN, "orchestrator"]
        ended[name] = Started(tmp_path / name, len(CUTS), planted.env, command, ZERO)
        code, err = ended[name].end()
        assert code == 0, err
        assert planted.fired() == planted.faults and err.count("a new gang goes on") == len(faults)
    ended["broken"].assert_equals(ended["unbroken"], ids)


def test_a_full_disk(tmp_path: Path, unbroken: Running) -> None:
    """Rank 0 cannot write what all have gathered: the trial fails, and the same command goes on from the checkpoint before."""
    study = Broken(tmp_path, GANG, 2)
    study.plant(("disk", "fsync", 0, 10, 0), ("disk", "put_fsync", 0, None, 1))
    code, err = study.run(ZERO)
    assert code == 3 and study.all_fired() and err.count("No space left on device") == 2, err
    code, err = study.run(ZERO)
    assert code == 0, err
    study.equals(unbroken)
