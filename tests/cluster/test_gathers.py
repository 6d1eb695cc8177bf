"""What DeepSpeed makes whole, and when: the optimizer's state for checkpoints alone, weights also for evaluations."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engines import make_worker
from orchestrator import checkpoint
from orchestrator.recipe.workload_schema import Target
from orchestrator.trainer import PhaseRun
from strategies.parts.replicas import tensors_in
from tests.cluster.test_deepspeed import EXACT, at
from tests.strategies import harness
from tests.strategies.cases import with_adamw
from tests.strategies.harness import Blobs, Trained, baseline, distance
from tests.workers import run_workers

pytestmark = pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")

STAGES = (1, 3)
STEPS, EVALUATED = 8, (4, 8)  # two epochs, a row at each step
SAVED = {"never": (), "once": (7,), "always": range(1, STEPS)}  # steps after which a checkpoint is due
LIMIT = 120.0
Counts = dict[str, int]


def watched(
    worker: Any, folder: Path, stage: int, saved: Collection[int], **options: Any
) -> tuple[Trained, Counts, Any]:
    """Trains, and counts what is gathered. Rank 1 would save at each row: the decision is rank 0's."""
    from cluster.engines.deepspeed import Shards

    counts = {"_gather_weights": 0, "_gathered_state": 0}

    def counted(name: str, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def gather(shards: Any) -> Any:
            counts[name] += 1
            return original(shards)

        return gather

    own: Any = make_worker(*at(stage), "fp32", worker.rank, worker.size, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        for name in counts:
            patch.setattr(Shards, name, counted(name, getattr(Shards, name)))
        patch.setattr(PhaseRun, "_save_due", lambda run: run.worker.rank > 0 or run.progress.step in saved)
        trained = harness.train(with_adamw(baseline(epochs=2)), folder, Blobs(dtype=torch.float32), own, **options)
    return trained, counts, own


def everything(worker: Any, folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for stage in STAGES:
        for name, saved in SAVED.items():
            *found[stage, name], own = watched(worker, folder / f"{name} {stage}", stage, saved)
        target = Target(train_loss=100.0, stop=True)  # reached at the first row, which has no evaluation
        found[stage, "stopped"] = watched(worker, folder / f"stopped {stage}", stage, (), target=target)[0]
        found[stage, "unasked"] = refusal(own)
    return found


def refusal(worker: Any) -> str:
    worker.shards.scatter()
    with pytest.raises(RuntimeError) as caught:
        worker.shards.state_dict()
    return str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gathers")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[Any, Any]:
    return run_workers(everything, 2, folder, limit=LIMIT)[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", SAVED)
def test_nothing_is_gathered_without_need(name: str, stage: int, found: dict[Any, Any]) -> None:
    _, counts = found[stage, name]
    assert counts["_gathered_state"] == len(SAVED[name])
    start = 1  # where weights are set
    assert counts["_gather_weights"] == (start + len({*SAVED[name], *EVALUATED}) if stage == 3 else 0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["never", "once"])
def test_results_are_those_of_a_gather_at_each_row(name: str, stage: int, found: dict[Any, Any]) -> None:
    (one, _), (other, _) = found[stage, name], found[stage, "always"]
    assert distance(one, other) == 0
    rows = [[{k: v for k, v in row.items() if "second" not in k} for row in run.rows] for run in (one, other)]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_is_whole(stage: int, folder: Path, found: dict[Any, Any]) -> None:
    """The one that was the first to gather anything, beside the last of many."""
    once, always = (folder / f"{name} {stage}" / "trial" / "checkpoints" for name in ("once", "always"))
    assert [path.name for path in once.iterdir()] == ["step_000000007"]
    states = [list(tensors_in(checkpoint.read(path / "step_000000007")["state"])) for path in (once, always)]
    parameters = len(found[stage, "once"][0].weights)
    assert len(states[0]) == len(states[1]) >= 3 * parameters  # weights, and AdamW's two means of each
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_a_phase_that_stops_between_evaluations_leaves_whole_weights(found: dict[Any, Any]) -> None:
    spread, whole = found[3, "stopped"], found[1, "stopped"]
    assert spread.progress.status == whole.progress.status == "done" and spread.progress.steps == 1
    assert distance(spread, whole) <= EXACT


@pytest.mark.parametrize("stage", STAGES)
def test_state_that_is_spread_is_not_written(stage: int, found: dict[Any, Any]) -> None:
    assert "gather(optimizer=True) makes it whole" in found[stage, "unasked"]
