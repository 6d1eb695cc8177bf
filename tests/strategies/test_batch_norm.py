"""Statistics estimated anew equal those over the pooled examples, however these are shared out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.engines import make_worker
from strategies.contract import Worker
from strategies.net import Net
from strategies.parts.batch_norm import reestimate, statistics, tracking
from tests.workers import run_workers


def deep_net() -> Net:
    """Convolutions and batch norms, one of them behind another, whose input depends on the first one's statistics."""
    torch.manual_seed(5)
    first = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5))
    return Net([first, second], head=nn.Linear(5, 3)).double()


def images(n: int = 13) -> Tensor:
    return torch.randn(n, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) * 3 + 1


def estimated(worker: Worker, n: int = 13) -> dict[str, Tensor]:
    net = deep_net()
    reestimate(net, images(n), worker)
    return {name: t.clone() for name, t in statistics(net).items()}


def alone() -> Any:
    return make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))


def test_statistics_are_those_of_all_examples_in_one_batch() -> None:
    """A forward pass in training, at momentum 1, sees every layer's mean, and its variance up to n / (n - 1)."""
    net, found = deep_net(), estimated(alone())
    for tracked in tracking(net).values():
        tracked.momentum = 1.0
    trained = net.train()(images())
    values = {"stages.0.1": 13 * 4 * 4, "stages.1.1": 13 * 2 * 2, "stages.1.4": 13}  # that each layer sees of a channel
    for name, n in values.items():
        norm: Any = net.get_submodule(name)
        assert torch.allclose(found[f"{name}.running_mean"], norm.running_mean, rtol=0, atol=1e-12)
        assert torch.allclose(found[f"{name}.running_var"], norm.running_var * (n - 1) / n, rtol=0, atol=1e-12)
    net.load_state_dict(found, strict=False)
    assert torch.allclose(net.eval()(images()), trained, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [13, 1])
def test_workers_pool_their_shares(n: int) -> None:
    """Also where one has no example at all."""
    one = estimated(alone(), n)
    for found in run_workers(estimated, 2, n):
        assert all(torch.allclose(found[name], one[name], rtol=0, atol=1e-12) for name in one)


def test_other_weights_leave_the_network_as_it_was() -> None:
    net = deep_net().train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    weights = {name: 2 * t.detach() for name, t in net.named_parameters()} | {
        name: t.clone() for name, t in statistics(net).items()
    }
    reestimate(net, images(), alone(), weights)
    assert net.training and all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    wanted = deep_net()
    wanted.load_state_dict(weights, strict=False)
    reestimate(wanted, images(), alone())
    assert all(torch.equal(weights[name], t) for name, t in statistics(wanted).items())
    net(images())
    assert not torch.equal(
        net.state_dict()["stages.0.1.running_mean"], before["stages.0.1.running_mean"]
    )  # no hook stays
