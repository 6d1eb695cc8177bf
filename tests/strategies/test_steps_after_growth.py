"""Kernels grow, and what an optimizer has gathered makes the same steps as before, grown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.engines import make_worker
from orchestrator.checkpoint import snapshot
from orchestrator.workloads.models import small_cnn
from strategies.backprop import Backprop
from strategies.contract import ModelSpec, State
from strategies.kernel_rescale import grown
from strategies.natural_gradient import TiedMomentum
from strategies.net import Net
from strategies.optimizers import AdamW, Sgd
from strategies.parts.kernel_growth import Grow
from strategies.rate import Rate

KERNEL = "stages.1.0.weight"


def cnn(inputs: tuple[int, ...], classes: int, kernel: int, norm: bool) -> Net:
    return small_cnn(inputs, classes, width=4, batch_norm=norm, kernel=kernel).double()


def step(net: Net, state: State, gradients: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """By how much it moves each weight."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = state.live.optimizer
    for p in net.parameters():
        p.grad = gradients(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["rate_factor"]
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in net.named_parameters()}


def switched(optimizer: Any, norm: bool) -> list[tuple[Net, State]]:
    """A small network after five steps on random gradients, and the large one that goes on."""
    torch.manual_seed(0)
    made, worker = (
        Backprop(optimizer=optimizer, rate=Rate(0.1)),
        make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")),
    )
    stages = tuple(ModelSpec(cnn, (("kernel", kernel), ("norm", norm))) for kernel in (3, 5))
    small, large = stages[0]((3, 8, 8), 3), grown((3, 8, 8), 3, stages, Grow())
    old, new = made.init(small, worker), made.init(large, worker)
    for _ in range(5):
        step(small, old, torch.randn_like)
    content = Grow().state(snapshot(old), new)
    large.load_state_dict(content["net"])
    new.live.optimizer.load_state_dict(content["optimizer"])
    return [(small, old), (large, new)]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("optimizer", "tolerance"), [(Sgd(), 1e-12), (AdamW(weight_decay=0.0), 0.03)])
def test_steps_after_growth(optimizer: Any, tolerance: float, norm: bool) -> None:
    """Without new gradients. Of Adam nearly: an interpolated quotient is not the quotient of interpolations."""
    (small, old), (large, new) = switched(optimizer, norm)
    growth = Grow().growths(small.state_dict(), large)[KERNEL]
    wanted = growth.resample(step(small, old, torch.zeros_like)[KERNEL], growth.amplitude)
    found = step(large, new, torch.zeros_like)[KERNEL]
    assert float(found.norm() / wanted.norm()) == pytest.approx(1, rel=tolerance)
    if isinstance(optimizer, Sgd):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", [True, False])
def test_decay_that_is_times_the_rate_stays(norm: bool) -> None:
    _, (_, new) = switched(AdamW(weight_decay=0.1), norm)
    decays = [group["rate_factor"] * group["weight_decay"] for group in new.live.optimizer.param_groups]
    assert {round(decay, 12) for decay in decays} == {0.0, 0.1}


def test_momentum_that_is_tied_does_not_feel_the_rates_of_layers() -> None:
    _, (large, new) = switched(TiedMomentum(Sgd(momentum=0.9)), norm=False)
    for _ in range(3):
        step(large, new, torch.randn_like)
    groups = new.live.optimizer.param_groups
    assert len({group["rate_factor"] for group in groups}) > 1
    assert [group["momentum"] for group in groups] == pytest.approx([0.9] * len(groups))
