"""Oracles of whitening: what its filters make of the patches they were made from."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from strategies.batch_growth import BatchGrowth
from strategies.contract import Batch, ModelSpec, Plan, PlanError
from strategies.net import Net
from strategies.whitening import WhitenFirst, Whitening, covariance, freeze_first
from tests.strategies.cases import convolved_net, with_convolutions, with_step_decay
from tests.strategies.harness import IMAGES, Blobs, baseline, train

EPS = 5e-4


def images(n: int = 300) -> Tensor:
    """(n, 3, 5, 6) float64: neighbouring pixels and channels are correlated, and their mean is not zero."""
    noise = torch.randn(n, 3, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return noise[..., :-1, :-1] + 0.8 * noise[..., 1:, 1:] + 0.5 * noise[:, [1, 2, 0], :-1, 1:] + 2


def read(x: Tensor) -> Callable[[int], Batch]:
    return lambda n: Batch(x[:n], torch.zeros(len(x[:n]), dtype=torch.int64), torch.arange(len(x[:n])))


def whitened(conv: nn.Conv2d, x: Tensor, examples: int = 300) -> nn.Conv2d:
    WhitenFirst(examples, EPS)(Net([conv.double()]), read(x))
    return conv


def spread(values: Tensor) -> Tensor:
    """(filters, filters) covariance of the maps (n, filters, h, w)."""
    return torch.cov(values.transpose(0, 1).flatten(1), correction=0)


def test_outputs_are_uncorrelated_with_unit_variance_up_to_eps() -> None:
    x, conv = images(), whitened(nn.Conv2d(3, 24, 2, bias=False), images())
    variances = torch.linalg.eigvalsh(covariance(x, conv)).flip(0)
    expected = torch.diag(variances / (variances + EPS))
    out = conv(x)
    assert (spread(out[:, :12]) - expected).abs().max() < 1e-12
    assert torch.equal(out[:, 12:], -out[:, :12])
    assert (expected.diag() - 1).abs().max() < 0.02


def test_fewer_filters_are_the_largest_components() -> None:
    x = images()
    all_of_them, few = whitened(nn.Conv2d(3, 24, 2), x), whitened(nn.Conv2d(3, 6, 2), x)
    assert torch.equal(few.weight[:3], all_of_them.weight[:3]) and torch.equal(few.weight[3:], -few.weight[:3])


def test_covariance_is_that_of_the_patches_one_by_one() -> None:
    """Also with a stride, over more images than are taken at once."""
    x, conv = images(), nn.Conv2d(3, 8, (2, 3), stride=(3, 2), padding=1)
    corners = itertools.product(range(0, 4, 3), range(0, 4, 2))
    patches = torch.stack([x[:, :, i : i + 2, j : j + 3].flatten(1) for i, j in corners]).flatten(0, 1)
    assert (covariance(x, conv) - torch.cov(patches.T, correction=0)).abs().max() < 1e-12


def test_the_first_examples_alone_are_read() -> None:
    x = images()
    changed = torch.cat([x[:100], 7 * x[100:]])
    first, same, more = (whitened(nn.Conv2d(3, 24, 2), *a).weight for a in ((x, 100), (changed, 100), (changed, 101)))
    assert torch.equal(first, same) and not torch.equal(first, more)


def test_the_filters_stay_and_the_bias_learns(tmp_path: Path) -> None:
    """Trained with weight decay and momentum; the examples are those of the data set in order, not of the stream."""
    trained = train(Whitening(20).edit(with_convolutions(baseline())), tmp_path, Blobs(inputs=IMAGES)).weights
    conv = whitened(nn.Conv2d(1, 8, 2), Blobs(inputs=IMAGES).x, 20)
    assert torch.equal(trained["stages.0.0.weight"], conv.weight)
    again = train(Whitening(20).edit(with_convolutions(baseline(epochs=4))), tmp_path / "b", Blobs(inputs=IMAGES))
    assert not torch.equal(trained["stages.0.0.bias"], again.weights["stages.0.0.bias"])


def test_a_phase_that_takes_weights_over_keeps_them(tmp_path: Path) -> None:
    """Batch growth cuts the run into phases: the filters are those of the first one, in either order of the two."""
    plan = with_step_decay(with_convolutions(baseline()))
    for name, methods in {"a": (Whitening(), BatchGrowth()), "b": (BatchGrowth(), Whitening())}.items():
        edited: Plan = plan
        for method in methods:
            edited = method.edit(edited)
        assert len(edited.phases) == 2
        weights = train(edited, tmp_path / name, Blobs(inputs=IMAGES)).weights
        expected = whitened(nn.Conv2d(1, 8, 2), Blobs(inputs=IMAGES).x)
        assert torch.equal(weights["stages.0.0.weight"], expected.weight)


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 26, 2), nn.Conv2d(3, 7, 2), nn.Conv2d(4, 4, 2, groups=2)])
def test_filters_that_cannot_whiten(conv: nn.Conv2d) -> None:
    with pytest.raises(PlanError, match=rf"has {conv.out_channels} filters in {conv.groups}: choose another"):
        freeze_first(Net([conv]))


def many_channels(inputs: tuple[int, ...], classes: int) -> Net:
    return convolved_net((3, *inputs[1:]), classes)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="whitening sets the first convolution, but the network has none"):
        train(Whitening().edit(baseline()), tmp_path)
    plan = Whitening().edit(baseline())
    wrong = plan.map(lambda phase: dataclasses.replace(phase, model=ModelSpec(many_channels)))
    with pytest.raises(PlanError, match=r"needs images of 3 channels, the examples have shape \(1, 2, 3\)"):
        train(wrong, tmp_path, Blobs(inputs=IMAGES))


@pytest.mark.parametrize(
    ("sides", "dilation", "patch"), [((1, 6), 1, "2 x 2"), ((5, 1), 1, "2 x 2"), ((3, 4), 3, "4 x 4")]
)
def test_images_smaller_than_a_patch(sides: tuple[int, int], dilation: int, patch: str) -> None:
    conv = nn.Conv2d(3, 6, 2, padding=3, dilation=dilation)
    with pytest.raises(
        PlanError, match=rf"patches of {patch} pixels .* shape \(3, {sides[0]}, {sides[1]}\): take larger"
    ):
        whitened(conv, images()[..., : sides[0], : sides[1]])
    enough = dilation + 1
    assert whitened(conv, images()[..., :enough, :enough]).weight.isfinite().all()
