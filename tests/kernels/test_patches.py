"""Convolution by patches against torch's own: value and both gradients, networks, autocast, the switch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from kernels.patches import PatchConvolution, by_patches, can, fold, patches

SHAPES = [  # n, channels, out, (h, w), (kh, kw), stride, padding
    (2, 3, 4, (4, 4), (3, 3), (1, 1), (1, 1)),
    (3, 2, 5, (2, 2), (3, 3), (1, 1), (1, 1)),
    (2, 3, 4, (8, 8), (3, 3), (2, 2), (1, 1)),
    (2, 3, 4, (7, 5), (3, 2), (2, 1), (0, 1)),
    (1, 1, 1, (1, 1), (3, 3), (1, 1), (1, 1)),
    (2, 3, 2, (5, 6), (5, 3), (1, 1), (2, 0)),
    (2, 3, 2, (3, 3), (2, 2), (1, 1), (2, 2)),  # padding beyond the kernel: the gradient is folded
    (2, 2, 3, (6, 6), (2, 2), (3, 3), (0, 0)),  # stride beyond the kernel: pixels that no patch sees
]


def by(function, x, weight, stride, padding):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(x, weight, stride, padding)
    out.backward(torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape))
    return out, x.grad, weight.grad


@pytest.mark.parametrize("n, channels, out, size, kernel, stride, padding", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_value_and_both_gradients(n, channels, out, size, kernel, stride, padding, layout):
    torch.manual_seed(0)
    x = torch.randn(n, channels, *size, dtype=torch.float64).to(memory_format=layout)
    weight = torch.randn(out, channels, *kernel, dtype=torch.float64).to(memory_format=layout)
    ours = by(PatchConvolution.apply, x, weight, stride, padding)
    plain = by(lambda x, w, s, p: conv2d(x, w, stride=s, padding=p), x, weight, stride, padding)
    for a, b in zip(ours, plain, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for stride in ((1, 1), (2, 2)):
        torch.autograd.gradcheck(lambda x, w, s=stride: PatchConvolution.apply(x, w, s, (1, 1)), (x, weight))


def test_second_derivatives_are_refused():
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    loss = PatchConvolution.apply(x, weight, (1, 1), (1, 1)).square().sum()
    first = torch.autograd.grad(loss, weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_fold_is_the_transpose_of_patches():
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    p = patches(x, (3, 2), (2, 1), (1, 1))
    other = torch.randn(p.shape, dtype=torch.float64)
    assert torch.allclose((p * other).sum(), (x * fold(other, (6, 5), (3, 2), (2, 1), (1, 1))).sum(), atol=1e-12)


@pytest.mark.parametrize("channels, out, side", [(64, 64, 4), (128, 32, 2)])
def test_as_exact_in_bf16_as_torch(channels, out, side):
    """Against the exact value: the worst error is no more than 1.5 times that of torch's convolution."""
    torch.manual_seed(0)
    x = torch.randn(8, channels, side, side).to(torch.bfloat16).to(memory_format=torch.channels_last)
    weight = (torch.randn(out, channels, 3, 3) / 24).to(torch.bfloat16).to(memory_format=torch.channels_last)
    exact = by(lambda x, w, s, p: conv2d(x, w, stride=s, padding=p), x.double(), weight.double(), 1, 1)
    plain = by(lambda x, w, s, p: conv2d(x, w, stride=s, padding=p), x, weight, 1, 1)
    ours = by(PatchConvolution.apply, x, weight, (1, 1), (1, 1))
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert (a.double() - c).abs().max() <= 1.5 * (b.double() - c).abs().max() + 1e-12


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(64, 5),
    ).double()  # fmt: skip


def accelerated(net: nn.Sequential) -> nn.Sequential:
    net = copy.deepcopy(net)
    convolutions = [m for m in net.modules() if can(m)]
    assert len(convolutions) == 3
    for conv in convolutions:
        by_patches(conv)
    return net


def test_a_network_keeps_its_names_weights_and_gradients():
    plain = network()
    ours = accelerated(plain)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert list(ours.state_dict()) == list(plain.state_dict())
    for net in (plain, ours):
        net(x).square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-12)
    assert torch.allclose(ours[0](x[0]), plain[0](x[0]))  # one image without a batch


def test_autocast_computes_in_bf16_and_returns_float32_gradients():
    net = accelerated(network().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net[0](torch.randn(2, 3, 8, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert net[0].weight.grad.dtype == torch.float32 and net[0].bias.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 1),
        nn.Linear(4, 4),
    ],
)
def test_what_it_cannot_do(module):
    assert not can(module)
