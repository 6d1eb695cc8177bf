"""Oracles of Muon: orthogonal steps for hidden matrices, the base optimizer's for all else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from strategies.contract import Need, PlanError
from strategies.lars import Lars
from strategies.muon import Muon, MuonAndBase
from strategies.net import Net
from strategies.optimizers import AdamW, Sgd
from tests.strategies.harness import baseline

SGD = Sgd(momentum=0.9, weight_decay=0.01)


def net(rows: int = 8) -> Net:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), nn.Linear(4, rows)]
    return Net(stages, head=nn.Linear(rows, 3)).double()


def step(
    net: Net, make: Callable[[Net], torch.optim.Optimizer], scale: float = 1.0, seeds: Iterable[int] = (0,)
) -> dict[str, Tensor]:
    """The weights after a step at rate 0.1 for each seed, on random gradients."""
    optimizer = make(net)
    for seed in seeds:
        torch.manual_seed(seed)
        for p in net.parameters():
            p.grad = scale * torch.randn_like(p)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * group.get("rate_factor", 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def gradient(rows: int) -> Tensor:
    """That of the hidden matrix in the first step."""
    made = net(rows)
    torch.manual_seed(0)
    found = {name: torch.randn_like(p) for name, p in made.named_parameters()}
    return found["stages.1.weight"]


def muon(**options: float) -> MuonAndBase:
    return MuonAndBase(SGD, Muon(**{"weight_decay": 0.0} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("base", [SGD, AdamW(weight_decay=0.1)])
def test_all_but_hidden_matrices_are_the_bases(base: Sgd | AdamW) -> None:
    """Convolutions, biases and the head: bit for bit."""
    plain, mixed = step(net(), base, seeds=range(3)), step(net(), MuonAndBase(base, Muon()), seeds=range(3))
    assert [name for name in plain if not torch.equal(plain[name], mixed[name])] == ["stages.1.weight"]


def test_hidden_matrices_are_torchs() -> None:
    def alone(net: Net) -> torch.optim.Optimizer:
        return torch.optim.Muon([net.stages[1].weight], lr=0.1, weight_decay=0.3, momentum=0.8)

    mixed = step(net(), muon(weight_decay=0.3, momentum=0.8), seeds=range(3))
    assert torch.equal(mixed["stages.1.weight"], step(net(), alone, seeds=range(3))["stages.1.weight"])


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_steps_are_nearly_orthogonal(rows: int) -> None:
    """Singular values of step / rate lie around sqrt(max(1, rows / columns)), whatever those of the gradient."""
    before = net(rows).stages[1].weight.detach()
    moved = (before - step(net(rows), muon())["stages.1.weight"]) / 0.1 / max(1, rows / 4) ** 0.5
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(
        gradient(rows), full_matrices=False
    )  # the gradient's own singular vectors; torch works in bf16
    turned = u.T @ moved @ vh.T
    assert (turned - turned.diagonal().diag()).abs().max() < 0.05


def test_the_scale_of_the_gradient_is_nothing() -> None:
    once, louder = step(net(), muon()), step(net(), muon(), scale=8.0)
    assert torch.equal(once["stages.1.weight"], louder["stages.1.weight"])


def test_the_rate_is_a_multiple_of_the_bases() -> None:
    start = net().stages[1].weight.detach()
    one, three = (step(net(), muon(rate=rate))["stages.1.weight"] - start for rate in (1.0, 3.0))
    assert torch.allclose(three, 3 * one, atol=1e-14, rtol=0)


def test_decay_is_decoupled() -> None:
    start = net().stages[1].weight.detach()
    decayed, plain = (step(net(), muon(weight_decay=decay))["stages.1.weight"] for decay in (0.5, 0.0))
    assert torch.allclose(plain - decayed, 0.1 * 0.5 * start, atol=1e-14, rtol=0)


def test_small_matrices_may_stay_with_the_base() -> None:
    assert torch.equal(step(net(), muon(smallest=5))["stages.1.weight"], step(net(), SGD)["stages.1.weight"])
    assert not torch.equal(step(net(), muon(smallest=4))["stages.1.weight"], step(net(), SGD)["stages.1.weight"])


def test_state_survives() -> None:
    """Saved after two steps and loaded into a new optimizer, the third step is the same."""
    broken = net()
    first, second = muon()(broken), muon()(broken)
    step(broken, lambda net: first, seeds=range(2))
    second.load_state_dict(first.state_dict())
    resumed, whole = step(broken, lambda net: second, seeds=(2,)), step(net(), muon(), seeds=range(3))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_refusals() -> None:
    with pytest.raises(PlanError, match="muon shares the weights with sgd or adamw, but the optimizer is LayerwiseSgd"):
        Muon().edit(Lars().edit(baseline()))
    with pytest.raises(PlanError, match="weight matrices outside the head, but the network has none"):
        muon()(Net([nn.Conv2d(1, 2, 3)], head=nn.Linear(2, 2)))
    assert Need.LAYER_GRADS in Muon().edit(baseline()).needs
