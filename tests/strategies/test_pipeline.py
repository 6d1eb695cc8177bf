"""Pipeline parallelism against plain backpropagation, in float64; test_roles.py has it on workers of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from torch import nn

from strategies.contract import ModelSpec, Plan, PlanError
from strategies.gradient_clipping import GradientClipping
from strategies.net import Net
from strategies.pipeline import Pipeline
from tests.strategies.cases import with_normalised_stages, with_stages
from tests.strategies.harness import IMAGES, Blobs, baseline, distance, train


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x):  # type: ignore[no-untyped-def]
        return x + self.branch(x)


def cnn(inputs: tuple[int, ...], classes: int) -> Net:
    first = nn.Sequential(nn.Conv2d(inputs[0], 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net([first, Residual(4), Residual(4)], pool, nn.Linear(4, classes))


def with_residuals(plan: Plan) -> Plan:
    return plan.map(lambda phase: dataclasses.replace(phase, model=ModelSpec(cnn)))


def test_it_is_backpropagation_in_micro_batches(tmp_path: Path) -> None:
    """Bit for bit where the trainer cuts the batch alike: with residual modules and batch norm."""
    base = with_residuals(baseline())
    cut = Pipeline(micro_batches=3, roles=False).edit(base)
    piped = train(cut, tmp_path / "piped", Blobs(inputs=IMAGES))
    plain = train(base, tmp_path / "plain", Blobs(inputs=IMAGES), micro_batch=4)
    assert distance(piped, plain) == 0
    assert piped.rows[-1]["train_loss"] == plain.rows[-1]["train_loss"]


@pytest.mark.parametrize(("batch", "parts"), [(12, 1), (12, 5), (11, 4), (12, 100)])
def test_micro_batches_make_one_batch(batch: int, parts: int, tmp_path: Path) -> None:
    """Also of unequal sizes, and where there are fewer examples than parts were asked for."""
    base = with_stages(baseline(epochs=1, batch=batch))
    piped = train(Pipeline(cuts=[1], micro_batches=parts, roles=False).edit(base), tmp_path / "piped")
    assert distance(piped, train(base, tmp_path / "plain")) < 1e-12


def test_normalised_are_micro_batches(tmp_path: Path) -> None:
    base = with_normalised_stages(baseline(epochs=1))
    found = [train(Pipeline(micro_batches=n, roles=False).edit(base), tmp_path / str(n)) for n in (1, 3)]
    assert distance(*found) > 1e-6


def test_each_module_has_an_optimizer_and_a_role() -> None:
    plan = Pipeline(cuts=[1]).edit(with_stages(baseline()))
    assert plan.roles == 2
    with pytest.raises(PlanError, match="looks at all modules"):
        GradientClipping().edit(plan)
    with pytest.raises(PlanError, match="state `cuts`"):
        Pipeline().edit(with_stages(baseline()))
