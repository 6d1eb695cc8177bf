"""The fused optimizers against torch's plain ones, also where memory layouts differ."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from strategies.net import Net
from strategies.optimizers import AdamW, Sgd, groups

CASES = [
    (Sgd(0.9, True, 1e-2), lambda net: torch.optim.SGD(groups(net, 1e-2), momentum=0.9, nesterov=True, fused=False)),
    (Sgd(), lambda net: torch.optim.SGD(groups(net, 0.0), momentum=0.9, fused=False)),
    (AdamW(weight_decay=0.1), lambda net: torch.optim.AdamW(groups(net, 0.1), fused=False)),
]


def network() -> Net:
    torch.manual_seed(0)
    net = Net([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)], nn.Flatten(), nn.Linear(2, 2)).double()
    return net.to(memory_format=torch.channels_last)


def step(optimizer, net, number):
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for i, p in enumerate(net.parameters()):  # gradients in torch's usual layout, beside weights that are channels-last
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(100 * number + i))
    optimizer.step()


@pytest.mark.parametrize("factory, plain", CASES)
def test_equal_to_the_plain_optimizer_whatever_the_layout(factory, plain):
    ours, theirs = network(), network()
    a, b = factory(ours), plain(theirs)
    for number in range(4):
        step(a, ours, number)
        step(b, theirs, number)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-14)


@pytest.mark.parametrize("factory, plain", CASES)
def test_a_state_that_lost_its_layout(factory, plain):
    """As after a checkpoint: all tensors contiguous."""
    ours, theirs = network(), network()
    a, b = factory(ours), plain(theirs)
    for number in range(2):
        step(a, ours, number)
        step(b, theirs, number)
    saved = a.state_dict()
    for state in saved["state"].values():
        state |= {name: value.contiguous() for name, value in state.items() if isinstance(value, torch.Tensor)}
    fresh = factory(ours)
    fresh.load_state_dict(saved)
    step(fresh, ours, 2)
    step(b, theirs, 2)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-14)


def test_a_gradient_in_place_stays_in_place():
    net = network()
    optimizer = Sgd()(net)
    grads = [torch.zeros_like(p) for p in net.parameters()]
    for p, grad in zip(net.parameters(), grads, strict=True):
        p.grad = grad
    optimizer.step()
    assert all(p.grad is grad for p, grad in zip(net.parameters(), grads, strict=True))
