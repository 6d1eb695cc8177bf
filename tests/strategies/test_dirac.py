"""Oracles of the Dirac start: what passes through unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from strategies.contract import PlanError
from strategies.dirac import Dirac, PassOn
from strategies.net import Net
from tests.strategies.harness import baseline, train


def started(share: float, later: nn.Conv2d) -> tuple[nn.Conv2d, nn.Conv2d]:
    """The first and the later convolution of a network, set."""
    first = nn.Conv2d(3, later.in_channels, 3)
    PassOn(share)(Net([nn.Sequential(first, nn.GELU(), later)]), lambda n: pytest.fail("reads no examples"))
    return first, later


@pytest.mark.parametrize(("channels", "out"), [(4, 8), (4, 4), (6, 4)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 1), (5, 1), (3, 2)])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_the_first_channels_pass_unchanged(channels: int, out: int, kernel: int, stride: int, share: float) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False).double()
    before = conv.weight.detach().clone()
    x = torch.randn(2, channels, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    passed = round(share * min(channels, out))
    y = started(share, conv)[1](x)
    assert (y[:, :passed] - x[:, :passed, ::stride, ::stride]).abs().max() < 1e-15 if passed else True
    assert torch.equal(conv.weight[passed:], before[passed:]) and conv.weight.requires_grad
    assert not any(torch.equal(new, old) for new, old in zip(conv.weight[:passed], before, strict=False))


def test_the_first_convolution_and_grouped_ones_stay() -> None:
    torch.manual_seed(0)
    first, later = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    grouped = nn.Conv2d(4, 4, 3, groups=4)
    kept = [first.weight.detach().clone(), grouped.weight.detach().clone()]
    PassOn(1.0)(Net([first, grouped, later]), lambda n: pytest.fail("reads no examples"))
    assert torch.equal(first.weight, kept[0]) and torch.equal(grouped.weight, kept[1])
    assert later.weight.sum() == 4


def test_refusal(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="dirac sets convolutions behind the first, but the network has none"):
        train(Dirac().edit(baseline()), tmp_path)
