"""What a step and an evaluation hold in memory at once, and what they do where it runs out."""

from __future__ import annotations

import dataclasses
import gc
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from strategies.backprop import Backprop
from strategies.contract import Batch, Phase, Plan, State
from tests.strategies.harness import Blobs, baseline, train

NEEDS = """
import resource, sys, psutil, torch
from cluster.engines.solo import SoloWorker
from orchestrator.micro_batch import largest, rehearse
from strategies.contract import Batch

torch.set_num_threads(1)
worker = SoloWorker(0, 1, torch.device("cpu"), "fp32")
worker.holders = int(sys.argv[2])
net = torch.nn.Linear(4096, 4096, bias=False)
batch = lambda n: Batch(torch.ones(n, 4096), torch.zeros(n), torch.arange(n))
rehearse(net, batch(64).x, worker)
room = float(sys.argv[1]) * net.weight.nbytes
resource.setrlimit(resource.RLIMIT_AS, [int(psutil.Process().memory_info().vms + room)] * 2)
try:
    print(largest(net, batch, 64, worker))
except MemoryError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("room", "holders", "found"), [(3.5, 1, "not even one example fits"), (8, 1, "64"), (3.5, 6, "64")]
)
def test_the_micro_batch_that_is_found_leaves_room_for_an_optimizer(room: float, holders: int, found: str) -> None:
    """`room`, in weights: the gradients of the passes are one, the moments and gradients under way of a step three more,
    which workers may share out."""
    command = [sys.executable, "-c", NEEDS, str(room), str(holders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tight(Backprop):
    """Predicts for `limit` examples at most."""

    limit: int

    def predict(self, state: State, x: Tensor) -> Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return Backprop.predict(self, state, x)


def tight(limit: int) -> Plan:
    def narrow(phase: Phase) -> Phase:
        usual: Any = phase.learner
        fields = {name: getattr(usual, name) for name in Backprop.__slots__}
        return dataclasses.replace(phase, learner=Tight(**fields, limit=limit))

    return baseline(epochs=1).map(narrow)


def evaluated(plan: Plan, folder: Path) -> dict[str, float]:
    row = train(plan, folder).rows[-1]
    return {name: row[name] for name in ("test_loss", "test_accuracy")}


def test_an_evaluation_that_runs_out_of_memory_takes_fewer_examples_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """31 -> 16 -> 8 -> 4; what a failed attempt held is gone when the next one begins."""
    roomy = evaluated(baseline(epochs=1), tmp_path / "roomy")
    before: list[weakref.ref[Tensor]] = []
    sizes = []
    read = Blobs.test

    def watched(data: Blobs, start: int, stop: int) -> Batch:
        assert all(one() is None for one in before)
        batch = read(data, start, stop)
        before.append(weakref.ref(batch.x))
        sizes.append(len(batch))
        return batch

    monkeypatch.setattr(Blobs, "test", watched)
    assert evaluated(tight(4), tmp_path / "tight") == pytest.approx(roomy, rel=1e-14)
    assert sizes == [31, 16, 8, *[4] * 7, 3]


def test_not_even_one_test_example_fits(tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match="not even one test example fits into memory"):
        train(tight(0), tmp_path)


def test_other_errors_of_an_evaluation_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("another one")

    monkeypatch.setattr(Tight, "predict", broken)
    with pytest.raises(RuntimeError, match="another one"):
        train(tight(4), tmp_path)


def test_a_step_holds_one_micro_batch_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = Blobs.train

    def counted(data: Blobs, start: int, stop: int) -> Batch:
        nonlocal most
        batch = read(data, start, stop)
        alive.append(weakref.ref(batch.x))
        gc.collect()
        most = max(most, sum(one() is not None for one in alive))
        return batch

    monkeypatch.setattr(Blobs, "train", counted)
    train(baseline(epochs=1), tmp_path, micro_batch=2)
    assert most == 2  # the next one is made before the one at work is let go
