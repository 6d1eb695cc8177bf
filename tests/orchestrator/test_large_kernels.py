"""Networks whose kernels are options: parameters by hand formulae, shapes, refusals."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.recipe.workload_schema import Network
from orchestrator.workloads import build_network
from strategies.contract import PlanError
from strategies.net import Net

RGB = (3, 32, 32)
OWN = ["overfeat", "small_overfeat", "alexnet", "convnext"]


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def default(name: str, inputs: tuple[int, ...], classes: int, **options: Any) -> Net:
    model = Network.model_validate({name: options})
    return build_network(inputs, classes, model.name, **model.options.model_dump())


def flat_parameters(widths: list[int], kernels: list[int], dense: list[int]) -> int:
    """Convolutions and linear layers with biases, each pair of neighbours in `widths` and `dense` a layer."""
    convolutions = sum(a * b * k * k + b for (a, b), k in zip(pairwise(widths), kernels, strict=True))
    return convolutions + sum(a * b + b for a, b in pairwise(dense))


def test_overfeat_fast() -> None:
    """Table 1 of the paper: 145 million parameters, 231 pixels, maps of 24, 12 and 6 pixels a side."""
    with torch.device("meta"):
        net = default("overfeat", (3, 231, 231), 1000)
        x, sides = torch.empty(1, 3, 231, 231), []
        for stage in net.stages:
            x = stage(x)
            sides.append(tuple(x.shape[1:]))
        assert net(torch.empty(2, 3, 231, 231)).shape == (2, 1000)
    widths, dense = [3, 96, 256, 512, 1024, 1024], [36 * 1024, 3072, 4096, 1000]
    assert count(net) == flat_parameters(widths, [11, 5, 3, 3, 3], dense) == 145_920_872
    assert sides == [(96, 28, 28), (256, 12, 12), (512, 12, 12), (1024, 12, 12), (1024, 6, 6), (3072,), (4096,)]


@pytest.mark.parametrize("kernels", [[7, 5, 3], [3, 3, 3], [15, 9, 5]])
def test_small_overfeat_and_alexnet(kernels: list[int]) -> None:
    each = [*kernels, kernels[2], kernels[2]]
    net = default("small_overfeat", RGB, 10, kernels=kernels, width=24)
    assert count(net) == flat_parameters([3, 24, 64, 128, 256, 256], each, [16 * 256, 384, 384, 10])
    net = default("alexnet", RGB, 10, kernels=kernels, width=32)
    assert count(net) == flat_parameters([3, 32, 96, 192, 128, 128], each, [16 * 128, 512, 512, 10])


@pytest.mark.parametrize(("kernel", "blocks"), [(7, [2, 2, 2]), (3, [1]), (5, [1, 3])])
def test_convnext(kernel: int, blocks: list[int]) -> None:
    """Per block: depthwise, two 1x1 convolutions with biases, norm and scale; between stages a norm and a 2x2 convolution."""
    widths, expected = [16 * 2**n for n in range(len(blocks))], 3 * 4 * 16 + 16 + 2 * 16
    for w, n in zip(widths, blocks, strict=True):
        expected += n * (w * kernel**2 + 2 * w + (4 * w * w + 4 * w) + (4 * w * w + w) + w)
    expected += sum(2 * a + 4 * a * b + b for a, b in pairwise(widths))
    expected += 2 * widths[-1] + widths[-1] * 10 + 10
    assert count(default("convnext", RGB, 10, kernel=kernel, width=16, blocks=blocks)) == expected


@pytest.mark.parametrize(("kernel", "stem"), [(3, 3), (5, 7), (7, 3)])
def test_resnet_and_small_cnn(kernel: int, stem: int) -> None:
    widths = [(16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    norms = 2 * (16 + sum(b for _, b in widths))
    expected = 3 * 16 * stem**2 + sum(a * b * kernel**2 for a, b in widths) + norms + 64 * 10 + 10
    assert count(default("resnet", RGB, 10, depth=8, kernel=kernel, stem=stem)) == expected
    expected = sum((a * b * kernel**2 + 2 * b) for a, b in pairwise((3, 8, 16, 32))) + 32 * 10 + 10
    assert count(default("small_cnn", RGB, 10, width=8, kernel=kernel)) == expected


@pytest.mark.parametrize("name", OWN[1:])
@pytest.mark.parametrize("inputs", [(1, 8, 8), (3, 19, 23)])
def test_every_network_learns_on_small_images(name: str, inputs: tuple[int, ...]) -> None:
    net = default(name, inputs, 7, width=8)
    x = torch.randn(4, *inputs, generator=torch.Generator().manual_seed(0))
    logits = net(x.to(memory_format=torch.channels_last))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_dropout_is_an_option() -> None:
    x = torch.randn(4, *RGB, generator=torch.Generator().manual_seed(0))
    for name in OWN[1:3]:
        with_it, without = default(name, RGB, 7, width=8), default(name, RGB, 7, width=8, dropout=0.0)
        assert not torch.equal(with_it(x), with_it(x)) and torch.equal(without(x), without(x))
        assert [m.p for m in with_it.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_refusals() -> None:
    for name in OWN:
        with pytest.raises(PlanError, match=rf"model {name} needs images"):
            default(name, (64,), 10)
    for name in ("overfeat", "small_overfeat", "convnext"):
        with pytest.raises(PlanError, match=rf"model {name}: images of shape \(3, 3, 3\) are too small"):
            default(name, (3, 3, 3), 10)
