"""Progressive resizing: the schedule of sizes, the network that stays, what it costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from orchestrator.recipe.workload_schema import Network
from orchestrator.workloads import build_network
from strategies.contract import ModelSpec, Phase, Plan, PlanError
from strategies.progressive_resize import ProgressiveResize
from tests.strategies.harness import baseline


def plan(name: str, **options: Any) -> Plan:
    spec = ModelSpec(
        build_network, (("name", name), *Network.model_validate({name: options}).options.model_dump().items())
    )
    return baseline(epochs=10).map(lambda phase: dataclasses.replace(phase, model=spec))


def sizes(phases: tuple[Phase, ...], side: int) -> list[tuple[float, int]]:
    return [(round(phase.epochs, 9), phase.source.shape((3, side, side))[1]) for phase in phases]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "side", "expected"),
    [
        ({}, 32, [(5, 16), (1, 20), (1, 24), (1, 28), (2, 32)]),
        ({"steps": 0}, 32, [(8, 16), (2, 32)]),
        ({"delay": 0.0, "steps": 2}, 224, [(4, 140), (4, 196), (2, 224)]),
        ({"delay": 0.8}, 32, [(8, 16), (2, 32)]),
        ({"scale": 0.25, "finetune": 0.5, "delay": 0.3, "steps": 1, "increment": 1}, 33, [(3, 8), (2, 21), (5, 33)]),
    ],
)
def test_sizes(options: dict[str, Any], side: int, expected: list[tuple[float, int]]) -> None:
    phases = ProgressiveResize(**options).edit(plan("resnet", depth=8)).phases
    assert sizes(phases, side) == expected
    assert [phase.hands_on for phase in phases] == [True] * (len(phases) - 1) + [False]


def test_the_ramp_is_that_of_a_continuous_one() -> None:
    """Pixels seen are those of sides that grow linearly between delay and 1 - finetune, up to the squares of half steps."""
    strategy = ProgressiveResize(scale=0.5, delay=0.4, finetune=0.2, steps=40)
    mean = sum(share * scale for share, scale in strategy.schedule())
    assert mean == pytest.approx(0.4 * 0.5 + 0.4 * 0.75 + 0.2) and sum(
        s for s, _ in strategy.schedule()
    ) == pytest.approx(1)


def test_the_network_stays() -> None:
    small, *_, whole = ProgressiveResize().edit(plan("resnet", depth=8)).phases
    torch.manual_seed(0)
    built = small.model((3, 32, 32), 10)
    torch.manual_seed(0)
    bare = whole.model((3, 32, 32), 10).state_dict()
    assert all(torch.equal(t, bare[name]) for name, t in built.state_dict().items())
    with pytest.raises(PlanError, match=r"cannot take images of shape \(3, 16, 16\): .* global pooling"):
        ProgressiveResize().edit(plan("alexnet", width=8)).phases[0].model((3, 32, 32), 10)


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"delay \+ finetune is 1.1, expected <= 1"):
        ProgressiveResize(delay=0.6, finetune=0.5)
    assert ProgressiveResize(scale=1.0).edit(plan("vgg")) == plan("vgg")
