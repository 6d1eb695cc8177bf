"""The noisy quadratic against its closed form and against published-in-advance step counts."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from orchestrator.identity import digest
from orchestrator.recipe.workload_schema import Workload
from orchestrator.workloads import open_dataset
from orchestrator.workloads.noisy_quadratic import NoisyQuadratic, QuadraticData, loss_after, network, steps_to_target
from strategies.contract import Clock, Learner, ModelSpec, Need, State, Worker

CPU = torch.device("cpu")
DIMENSION = 10_000
RATES = np.geomspace(1e-4, 1.99, 120)

# Steps to 1 % of the initial loss at the best of 120 rates, by batch size.
TABLE = {
    1: 838130, 4: 209894, 16: 53476, 64: 14517, 256: 6081,
    1024: 4542, 4096: 4228, 16384: 4044, 65536: 3862, 262144: 3819,
}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    value: float

    def __call__(self, clock: Clock) -> float:
        return self.value


def worker(size: int = 1) -> Worker:
    return cast(Worker, SimpleNamespace(rank=0, size=size, role=0, device=CPU))


def clock(step: int, batch: int) -> Clock:
    return Clock(step=step, steps=100, epoch=0.0, epochs_per_step=0.1, batch=batch, seed=0)


def start(rate: float, dimension: int, size: int = 1) -> tuple[Learner, State]:
    learner = NoisyQuadratic(dimension, Constant(rate))
    return learner, learner.init(network((1,), 1), worker(size))


def predicted(learner: Learner, state: State) -> float:
    return float(learner.predict(state, torch.zeros(1, 1))[0, 0])


@pytest.mark.parametrize(("batch", "steps"), TABLE.items())
def test_tuned_steps_to_target(batch: int, steps: int) -> None:
    target = 0.01 * loss_after(0, 0.1, batch, DIMENSION)
    best: int | None = None
    for rate in RATES:
        if best is None or loss_after(best - 1, rate, batch, DIMENSION) <= target:  # only rates that improve on it
            best = steps_to_target(rate, batch, target, DIMENSION) or best
    assert best == steps


def test_initial_loss() -> None:
    assert loss_after(0, 0.5, 8, DIMENSION) == pytest.approx(4.8938, abs=5e-5)
    assert predicted(*start(0.5, DIMENSION)) == pytest.approx(loss_after(0, 0.5, 8, DIMENSION), abs=1e-12)


@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0, 1.9])
@pytest.mark.parametrize("batch", [1, 64])
def test_learner_equals_the_closed_form(rate: float, batch: int) -> None:
    learner, state = start(rate, 100)
    for step in range(50):
        told = learner.step(state, [], clock(step, batch))["loss"]
        assert abs(float(told) - loss_after(step + 1, rate, batch, 100)) < 1e-12
        assert abs(predicted(learner, state) - float(told)) < 1e-12


@pytest.mark.parametrize(
    ("rate", "batch", "share"), [(0.3, 4, 0.5), (0.9, 64, 0.1), (0.02, 1, 0.2), (1.0, 16, 0.3), (1.9, 256, 0.05)]
)
def test_first_step_at_the_target_is_exact(rate: float, batch: int, share: float) -> None:
    target = share * loss_after(0, rate, batch, 20)
    learner, state = start(rate, 20)
    steps = 0
    while predicted(learner, state) > target:
        learner.step(state, [], clock(steps, batch))
        steps += 1
    assert steps > 0 and steps_to_target(rate, batch, target, 20) == steps


def test_targets_at_the_edges() -> None:
    first = loss_after(0, 0.5, 8, 20)
    assert steps_to_target(0.5, 8, first, 20) == 0
    assert steps_to_target(1.5, 1, 0.01 * first, 20) is None  # noise keeps the loss above


def test_workers_tell_equal_shares_of_the_loss() -> None:
    alone, shared = ((start(0.5, 20, size)) for size in (1, 4))
    whole, part = (learner.step(state, [], clock(0, 8))["loss"] for learner, state in (alone, shared))
    assert abs(float(whole) - 4 * float(part)) < 1e-15


def test_the_moment_is_all_that_is_saved() -> None:
    learner, state = start(0.5, 20)
    learner.step(state, [], clock(0, 8))
    resumed = learner.init(network((1,), 1), worker())
    resumed.saved["second_moment"] = state.saved["second_moment"].clone()
    ahead, behind = (learner.step(s, [], clock(1, 8))["loss"] for s in (state, resumed))
    assert list(state.saved) == ["second_moment"] and torch.equal(ahead, behind)
    assert state.saved["second_moment"].dtype == torch.float64


def test_data_and_network_have_the_usual_interface() -> None:
    data = open_dataset(Workload.model_validate({"data": "noisy_quadratic"}), 0, CPU, torch.float32)
    assert isinstance(data, QuadraticData)
    assert (data.examples, data.test_examples, data.inputs, data.classes) == (10_000, 1, (1,), 1)
    batch = data.train(5, 300_000)
    assert len(batch) == len(batch.y) == 299_995 and batch.position[0] == 5
    assert batch.x.untyped_storage().nbytes() < 100  # no content
    learner, state = start(0.5, 20)
    test = data.test(0, 1)
    score = data.score(learner.predict(state, test.x), test.y)
    assert score["test_loss"].item() == predicted(learner, state)
    net = ModelSpec(network)(data.inputs, data.classes)
    assert not list(net.parameters()) and learner.needs == Need.NOTHING
    assert digest(learner) == digest(NoisyQuadratic(20, Constant(0.5)))
