"""Oracles of the rate of biases: how far each parameter moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from strategies.backprop import _set_rate
from strategies.bias_rate import BiasRate, FactorOnBiases
from strategies.contract import PlanError
from strategies.lars import LayerwiseSgd
from strategies.muon import Muon, MuonAndBase
from strategies.net import Net
from strategies.optimizers import AdamW, Sgd
from strategies.parts.ghost_layer import split
from tests.strategies.harness import baseline, train


def net() -> Net:
    """Two norms with biases, one without, and a linear layer with a bias of its own; all parameters are 1."""
    made = Net([nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LayerNorm(2), nn.LayerNorm(2, bias=False)]).double()
    for p in made.parameters():
        nn.init.ones_(p)
    return made


def moves(optimizer: Callable[[Net], Optimizer], net: Net, rate: float = 0.01) -> dict[str, float]:
    """How far each parameter goes in one step on gradients of 1."""
    made = optimizer(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    _set_rate(made, rate)
    made.step()
    return {name: 1 - p.flatten()[0].item() for name, p in net.named_parameters()}


@pytest.mark.parametrize(
    "optimizer",
    [
        Sgd(momentum=0.0),
        Sgd(momentum=0.9),
        AdamW(eps=1e-30, weight_decay=0.0),
        LayerwiseSgd(Sgd(momentum=0.0), 0.0, True),
    ],
)
def test_biases_of_norms_go_further(optimizer: Callable[[Net], Optimizer]) -> None:
    expected = {
        name: 0.04 if name in ("stages.1.bias", "stages.2.bias") else 0.01 for name, _ in net().named_parameters()
    }
    assert moves(optimizer, FactorOnBiases(4.0)(net())) == pytest.approx(expected, abs=1e-12)


def test_they_are_not_decayed() -> None:
    moved = moves(Sgd(momentum=0.0, weight_decay=0.5), FactorOnBiases(4.0)(net()))
    assert moved["stages.0.weight"] == pytest.approx(0.015, abs=1e-15)
    assert moved["stages.1.bias"] == pytest.approx(0.04, abs=1e-15)


def test_beside_muon_and_through_split_norms() -> None:
    optimizer = MuonAndBase(Sgd(momentum=0.0), Muon(weight_decay=0.0))
    for made in (FactorOnBiases(4.0)(split(net(), 2, True)), split(FactorOnBiases(4.0)(net()), 2, True)):
        moved = moves(optimizer, made.double())
        assert moved["stages.1.bias"] == pytest.approx(0.04, abs=1e-15)
        assert moved["stages.0.bias"] == pytest.approx(0.01, abs=1e-15)


def test_refusal(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="bias_rate is for biases of normalisation layers, but the network has none"):
        train(BiasRate().edit(baseline()), tmp_path)
