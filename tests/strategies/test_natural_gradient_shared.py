"""natural_gradient on several workers: the same weights for each placement, less memory, checkpoints that all can read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.engines import make_worker
from strategies.natural_gradient import NaturalGradient
from strategies.net import Net
from tests.strategies import harness
from tests.strategies.harness import IMAGES, Blobs, FlatNet, baseline
from tests.strategies.test_natural_gradient import EXACT, batch, clock, edited, train
from tests.workers import run_workers

FRACTIONS = (0.25, 0.5, 1.0)  # of 4 workers


def shared_out(worker: Any, directory: Path) -> list[tuple[dict[str, Tensor], int]]:
    """For each fraction, the weights after training, on rank 0, and the numbers that this rank keeps of a network."""
    found = []
    for fraction in FRACTIONS:
        plan = edited({"gradient_workers": fraction}, epochs=1)
        weights = harness.train(plan, directory / str(fraction), Blobs(inputs=IMAGES), worker).weights
        found.append((weights, kept(worker, fraction)))
    return found


def even_net(inputs: tuple[int, ...], classes: int) -> Net:
    """Four layers of the same size, and a small head."""
    return FlatNet(
        [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)], head=nn.Linear(6, classes, bias=False)
    )


def kept(worker: Any, fraction: float) -> int:
    """Numbers, after a step."""
    made: Any = NaturalGradient(gradient_workers=fraction).edit(baseline()).phases[0].learner
    state = made.init(even_net((6,), 3).double(), worker)
    size = 12 // worker.size
    made.step(state, [batch(size, size * worker.rank, (6,))], clock())
    return sum(t.numel() for t in state.saved["updates"][0].live.kept.values())


def test_placements_give_the_same_and_take_less_memory(tmp_path: Path) -> None:
    alone = train(edited({}, epochs=1), tmp_path / "alone").weights
    found = run_workers(shared_out, 4, tmp_path)
    for weights, _ in found[0]:
        assert max(float((alone[k] - weights[k]).abs().max()) for k in alone) < EXACT
    most = [max(numbers) for numbers in zip(*([n for _, n in own] for own in found), strict=True)]
    whole = kept(make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")), 1.0)
    factors = 49 + 36  # of each large layer; their inverses are as large
    head = 36 + 9
    assert whole == 4 * 2 * factors + 2 * head
    assert most == [2 * factors + 2 * head, 3 * factors + 2 * head, 5 * factors + 2 * head]


def resumed(worker: Any, directory: Path, fail_at: int | None = None) -> dict[str, Tensor] | None:
    """Trained on, with checkpoints at each row; None where the planted fault ended it."""
    data = Blobs(inputs=IMAGES, fail_at=fail_at)
    plan = edited({"gradient_workers": 0.5, "tolerance": 0.2}, epochs=2)
    try:
        return harness.train(plan, directory, data, worker, save_seconds=0).weights
    except InterruptedError:
        return None


def resumed_by_two(worker: Any, directory: Path) -> list[dict[str, Tensor] | None]:
    """Unbroken; broken; gone on with. The broken one's files are kept for others."""
    found = [resumed(worker, directory / "unbroken"), resumed(worker, directory / "broken", 5 * 12)]
    if worker.rank == 0:
        shutil.copytree(directory / "broken", directory / "alone")
    worker.sum_(torch.zeros(1))
    return [*found, resumed(worker, directory / "broken")]


def test_two_workers_resume_and_one_goes_on_with_their_checkpoint(tmp_path: Path) -> None:
    unbroken, broken, again = run_workers(resumed_by_two, 2, tmp_path)[0]
    alone = resumed(make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")), tmp_path / "alone")
    assert broken is None and alone is not None
    assert all(torch.equal(unbroken[k], again[k]) for k in unbroken)
    assert max(float((unbroken[k] - alone[k]).abs().max()) for k in unbroken) < EXACT
