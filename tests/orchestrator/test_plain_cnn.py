"""CNN 1 to 8 of Griswold's study: tokens, parameters and multiplications of each stage, as reconstructed from its table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.workloads import build_network
from strategies.contract import PlanError
from strategies.net import Net

CNNS = {
    1: ["C3 C3 P"],
    2: ["C3", "C3 P"],
    3: ["C3 C1", "C3 C1 P"],
    4: ["C3 C3", "C3 C3 P"],
    5: ["C3 C1 P", "C3 C1 P"],
    6: ["C3 C3 P", "C3 C3 P"],
    7: ["C3 C1 P", "C3 C1 P", "C3 C1 P"],
    8: ["C3 C3 P", "C3 C3 P", "C3 C3 P"],
}
TABLE: dict[int, tuple[list[int], list[int], list[int], list[float]]] = {
    # features at each cut, parameters of each stage, of a linear head there, forward MMAC of each stage
    1: ([8192], [10144], [81930], [10.3]),
    2: ([32768, 8192], [896, 9248], [327690, 81930], [0.9, 9.4]),
    3: ([32768, 8192], [1952, 10304], [327690, 81930], [1.9, 10.5]),
    4: ([32768, 8192], [10144, 18496], [327690, 81930], [10.3, 18.9]),
    5: ([8192, 2048], [1952, 10304], [81930, 20490], [1.9, 2.6]),
    6: ([8192, 2048], [10144, 18496], [81930, 20490], [10.3, 4.7]),
    7: ([8192, 2048, 512], [1952, 10304, 10304], [81930, 20490, 5130], [1.9, 2.6, 0.7]),
    8: ([8192, 2048, 512], [10144, 18496, 18496], [81930, 20490, 5130], [10.3, 4.7, 1.2]),
}


def cnn(stages: list[str], inputs: tuple[int, ...] = (3, 32, 32), width: int = 32) -> Net:
    return build_network(inputs, 10, "plain_cnn", stages=stages, width=width)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("number", CNNS)
def test_the_table(number: int) -> None:
    features, parameters, heads, mega = TABLE[number]
    net, x = cnn(CNNS[number]), torch.randn(1, 3, 32, 32)
    assert [count(stage) for stage in net.stages] == parameters
    for i, stage in enumerate(net.stages):
        with FlopCounterMode(display=False) as counter:
            x = stage(x)
        assert x.numel() == features[i]
        assert round(counter.get_total_flops() / 2e6, 1) == mega[i]
        assert count(cnn(CNNS[number][: i + 1]).head) == heads[i]
    assert len(net.stages) == len(features) and count(net.head) == heads[-1]


def test_twelve_of_seventeen_stages_are_different_beginnings() -> None:
    beginnings = [tuple(stages[: i + 1]) for stages in CNNS.values() for i in range(len(stages))]
    assert (len(beginnings), len(set(beginnings))) == (17, 12)


def test_small_sides_and_width() -> None:
    net = cnn(["C5 P", "C1 P", "P"], inputs=(1, 5, 3), width=4)
    assert net(torch.randn(2, 1, 5, 3)).shape == (2, 10)
    assert count(net.stages[1]) == 4 * 4 + 4


def test_flat_data_are_refused() -> None:
    with pytest.raises(PlanError, match="needs images"):
        cnn(["C3"], inputs=(64,))


@pytest.mark.parametrize("stages", [[], ["C2"], ["C3  P"], ["conv"], [""], "C3"])
def test_what_is_no_stage_is_refused(stages: Any) -> None:
    from pydantic import ValidationError

    from orchestrator.recipe.workload_schema import Network

    with pytest.raises(ValidationError):
        Network.model_validate({"plain_cnn": {"stages": stages}})
