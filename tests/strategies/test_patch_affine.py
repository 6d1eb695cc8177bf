"""Oracles of patch_affine: convolutions by patches are convolutions, and what factors see of patches is what it should be."""

from __future__ import annotations

from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, unfold

from cluster.engines import make_worker
from strategies.contract import Clock, Plan, PlanError, State
from strategies.curvature.layers import ConvLayer
from strategies.natural_gradient import NaturalGradient
from strategies.net import Net
from strategies.ng_sgd import NgSgd
from strategies.parts import patch_layer
from strategies.parts.online_fisher import of_rows
from strategies.parts.patch_layer import Patches, Rows
from strategies.parts.preconditioner import Preconditioner
from strategies.patch_affine import PatchAffine
from tests.strategies.cases import convolved_net, with_convolutions
from tests.strategies.harness import CLASSES, IMAGES, Blobs, baseline, distance, train

SOLO = make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))
EXPAND = Patches("expand", 32, "images", 64)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "bare": {"kernel_size": 3, "bias": False},
    "pointwise": {"kernel_size": 1},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "oblong": {"kernel_size": (2, 4), "stride": (3, 1), "padding": (1, 0)},
    "dilated": {"kernel_size": (3, 2), "dilation": (2, 3), "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2, "stride": 2},
    "depthwise": {"kernel_size": (3, 2), "groups": 4, "dilation": 2},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"kernel_size": (3, 2), "padding": 1, "padding_mode": "circular", "stride": 2},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def convolution(shape: dict[str, Any]) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, **shape).double()


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 4, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_patches(conv: nn.Conv2d, patches: Patches = EXPAND) -> nn.Conv2d:
    patch_layer.replace(Net([conv]), patches, None)
    assert isinstance(conv, patch_layer.PatchAffine)
    return conv


def results(conv: nn.Conv2d) -> dict[str, Tensor]:
    """The output, and the gradients of input and parameters."""
    conv.zero_grad()
    x = images().requires_grad_()
    out = conv(x)
    out.backward(torch.arange(out.numel(), dtype=out.dtype).sin().view(out.shape))
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in conv.named_parameters()}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@every_shape
@pytest.mark.parametrize("chunk", [64, 0])
def test_it_is_autograds_convolution(shape: dict[str, Any], chunk: int) -> None:
    """A chunk of 0 takes one image at a time."""
    wanted, found = results(convolution(shape)), results(by_patches(convolution(shape), replace(EXPAND, chunk=chunk)))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-13, atol=1e-13), name


def test_second_derivatives_are_refused() -> None:
    conv = by_patches(convolution(SHAPES["padded"]))
    x = images().requires_grad_()
    (first,) = torch.autograd.grad(conv(x).square().sum(), conv.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_a_chunk_bounds_the_patches_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = by_patches(nn.Conv2d(4, 8, 3, padding=1), replace(EXPAND, chunk=1))
    made: list[int] = []
    real = patch_layer._rows

    def counted(layer: ConvLayer, windows: Tensor) -> Tensor:
        made.append(windows.numel() * windows.element_size())
        return real(layer, windows)

    monkeypatch.setattr(patch_layer, "_rows", counted)
    x = torch.randn(50, 4, 32, 32, requires_grad=True)  # of 144 KiB of patches each
    conv(x).sum().backward()
    assert max(made) <= 2**20 and len(made) == 2 * 8


def layer_of(shape: dict[str, Any], patches: Patches = EXPAND) -> ConvLayer:
    return ConvLayer("conv", by_patches(convolution(shape), patches))


def seen(layer: ConvLayer, x: Tensor, seed: int = 0) -> tuple[list[Rows], Tensor]:
    """(what factors see, the gradient of the output)."""
    out = layer.module(x)
    grad = torch.arange(out.numel(), dtype=out.dtype).sin().view(out.shape)
    return list(patch_layer.seen(layer, x, grad, seed)), grad


def moments(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("name", ["plain", "bare", "padded", "oblong", "dilated"])
def test_all_patches_give_the_factors_of_kfc(name: str) -> None:
    """Omega / T and Gamma from torch's unfold, padded zeros included."""
    shape = SHAPES[name]
    layer, conv = layer_of(shape), convolution(shape)
    (rows,), grad = seen(layer, images())
    columns = unfold(images(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
    n, _, positions = columns.shape
    if conv.bias is not None:
        columns = pad(columns, (0, 0, 0, 1), value=1.0)
    omega = torch.einsum("nit,njt->ij", columns, columns) / n
    order = layer.rows(torch.arange(conv.weight[0].numel()).view_as(conv.weight[:1]))[0]
    order = torch.cat([order, torch.arange(len(order), len(omega))])  # the bias' one is last in both
    assert torch.allclose(moments(rows.inputs), omega[order][:, order] / positions, rtol=1e-12, atol=1e-13)
    gamma = torch.einsum("nohw,nphw->op", grad, grad) / (n * positions)
    assert torch.allclose(moments(rows.outputs), gamma, rtol=1e-12, atol=1e-13)


def test_groups_share_factors() -> None:
    layer = layer_of(SHAPES["grouped"])
    ((rows,), _) = seen(layer, images())
    columns = [unfold(half, 3, stride=2).transpose(1, 2).flatten(0, 1) for half in images().chunk(2, 1)]
    order = layer.rows(torch.arange(18).view(1, 2, 3, 3))[0]
    mean = (moments(columns[0]) + moments(columns[1])) / 2
    assert torch.allclose(moments(rows.inputs)[:-1, :-1], mean[order][:, order], rtol=1e-12)


@every_shape
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_rows_make_the_gradient(shape: dict[str, Any]) -> None:
    """Y'X, summed over groups, is the gradient that autograd finds."""
    layer = layer_of(shape)
    parts, grad = seen(layer, images())
    layer.module.zero_grad()
    layer.module(images()).backward(grad)
    product = sum(rows.outputs.T @ rows.inputs for rows in parts)
    assert torch.allclose(torch.as_tensor(product), layer.matrix().sum(0), rtol=1e-12, atol=1e-12)


def test_the_mean_patch_makes_the_gradient_before_a_global_mean() -> None:
    """There each position's gradient is the same, and sums over positions lose nothing."""
    layer = layer_of(SHAPES["padded"], replace(EXPAND, mode="reduce"))
    x = images()
    out = layer.module(x)
    grad = torch.randn(5, 8, 1, 1, dtype=torch.float64).expand_as(out)
    out.backward(grad)
    (rows,) = patch_layer.seen(layer, x, grad, 0)
    assert rows.inputs.shape == (5, 37) and rows.outputs.shape == (5, 8)
    assert torch.allclose(rows.outputs.T @ rows.inputs, layer.matrix()[0], rtol=1e-12, atol=1e-13)


def test_drawn_positions_are_unbiased_and_alike_in_all_parts() -> None:
    shape = SHAPES["oblong"]
    layer, every = layer_of(shape, replace(EXPAND, mode="sample", positions=3, chunk=0)), layer_of(shape)
    draws = torch.stack([moments(torch.cat([r.inputs for r in seen(layer, images(), seed)[0]])) for seed in range(400)])
    wanted = moments(seen(every, images())[0][0].inputs)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - wanted).abs() <= 4.5 * error + 1e-12).all()  # of 1089 entries
    whole = list(seen(layer_of(shape, replace(EXPAND, mode="sample", positions=3)), images(), 7)[0])
    parts = seen(layer, images(), 7)[0]
    assert len(parts) == 5 and torch.equal(torch.cat([r.inputs for r in parts]), whole[0].inputs)
    many = layer_of(shape, replace(EXPAND, mode="sample", positions=1000))
    assert torch.equal(seen(many, images())[0][0].inputs, seen(every, images())[0][0].inputs)


def test_an_image_counts_once_or_as_often_as_it_is_seen() -> None:
    def samples(**options: Any) -> float:
        return sum(rows.samples for rows in seen(layer_of(SHAPES["padded"], replace(EXPAND, **options)), images())[0])

    assert samples() == samples(mode="sample", positions=3) == samples(mode="reduce", count="positions") == 5
    assert samples(count="positions") == 5 * 72 and samples(count="positions", mode="sample", positions=3) == 15


def gradients(net: Net, x: Tensor, y: Tensor, options: NgSgd, steps: int = 2) -> list[Tensor]:
    """Preconditioned, after some steps on the same batch."""
    state = State()
    preconditioner = Preconditioner(net, SOLO, options, state)
    for step in range(steps):
        net.zero_grad()
        cross_entropy(net(x), y).backward()
        preconditioner.step(Clock(step, steps, 0.0, 1.0, len(x), 0))
    return [p.grad for p in net.parameters() if p.grad is not None]


def pooled(conv: nn.Module, pool: nn.Module | None = None) -> Net:
    torch.manual_seed(3)
    pool = pool or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net([conv, nn.Tanh()], pool, nn.Linear(8, 3).double())


def labels(n: int) -> Tensor:
    return torch.arange(n) % 3


def test_with_one_position_it_is_a_linear_layer() -> None:
    """The linear layer's columns being in the order of the patches': rows are equal bit for bit, the rest but for rounding."""
    conv = by_patches(nn.Conv2d(4, 8, (9, 8)).double())
    linear = nn.Linear(4 * 72, 8).double()
    with torch.no_grad():
        linear.weight.copy_(ConvLayer("", conv).rows(conv.weight))
        linear.bias.copy_(conv.bias)  # type: ignore[arg-type]
    x = images(12)
    flat = x.permute(0, 2, 3, 1).flatten(1)
    ours = gradients(pooled(conv), x, labels(12), NgSgd())
    theirs = gradients(pooled(linear, nn.Identity()), flat, labels(12), NgSgd())
    assert torch.equal(ConvLayer("", conv).inputs(x)[0, :, 0], pad(flat, (0, 1), value=1.0))
    ours[0] = ConvLayer("", conv).rows(ours[0])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(ours, theirs, strict=True))


def test_order_and_shifts_of_images_do_not_matter() -> None:
    """Shifting circularly padded images around permutes the rows, and so does another order of the examples."""
    shape = {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}
    usual = gradients(pooled(by_patches(convolution(shape))), images(12), labels(12), NgSgd())
    for x, y in (
        (images(12).roll((2, 3), (2, 3)), labels(12)),
        (images(12).flip(0), labels(12).flip(0)),
    ):
        moved = gradients(pooled(by_patches(convolution(shape))), x, y, NgSgd())
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(usual, moved, strict=True))


def with_conv_factors(**options: Any) -> Plan:
    return NgSgd(layer_change=None, total_change=None, **options).edit(with_convolutions(baseline()))


def run(plan: Plan, folder: Path) -> Any:
    return train(plan, folder, Blobs(inputs=IMAGES))


def test_with_much_smoothing_a_step_is_plain_sgds(tmp_path: Path) -> None:
    plain = run(with_convolutions(baseline()), tmp_path / "plain")
    smooth = run(PatchAffine().edit(with_conv_factors(alpha=1e13)), tmp_path / "smooth")
    assert distance(plain, smooth) < 1e-11


def test_by_itself_it_changes_nothing(tmp_path: Path) -> None:
    """Nor with natural_gradient, which makes patches of its own."""
    for name, base in (("sgd", baseline()), ("natural", NaturalGradient(damping=0.1).edit(baseline()))):
        usual = run(with_convolutions(base), tmp_path / name)
        assert distance(run(PatchAffine().edit(with_convolutions(base)), tmp_path / f"patches {name}"), usual) < 1e-12


@pytest.mark.parametrize(
    "options",
    [{"mode": "reduce"}, {"mode": "sample", "positions": 1}, {"count": "positions"}, {"largest": 8}, {"largest": 0}],
    ids=str,
)
def test_every_option_acts(options: dict[str, Any], tmp_path: Path) -> None:
    usual = run(PatchAffine().edit(with_conv_factors()), tmp_path / "usual")
    assert distance(run(PatchAffine(**options).edit(with_conv_factors()), tmp_path / "other"), usual) > 1e-7


def test_sampling_everywhere_is_no_sampling(tmp_path: Path) -> None:
    every = run(PatchAffine().edit(with_conv_factors()), tmp_path / "every")
    drawn = run(PatchAffine(mode="sample", positions=99).edit(with_conv_factors()), tmp_path / "drawn")
    assert distance(every, drawn) == 0


def test_positions_that_count_let_one_batch_make_a_factor_forget() -> None:
    """The trap: 128 images of 784 positions enter by 0.9, of which images alone would enter by 1 - exp(-128 / 2000)."""
    state = State()
    preconditioner = Preconditioner(convolved_net(IMAGES, CLASSES).double(), SOLO, NgSgd(), state)
    by_images, by_positions = (float(preconditioner._eta(torch.tensor(float(n)))) for n in (128, 128 * 784))
    assert by_images == pytest.approx(1 - exp(-128 / 2000)) and by_positions == pytest.approx(0.9)


def test_a_network_without_convolutions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="replaces convolutions"):
        train(PatchAffine().edit(baseline()), tmp_path)


def test_what_parts_add_up_to_is_what_a_factor_sees() -> None:
    (rows,), _ = seen(layer_of(SHAPES["padded"]), images())
    parts, _ = seen(layer_of(SHAPES["padded"], replace(EXPAND, chunk=0)), images())
    products = [of_rows(r.inputs, None, True)[1] for r in parts]
    assert torch.allclose(torch.stack(products).sum(0), of_rows(rows.inputs, None, True)[1], rtol=1e-13, atol=1e-12)
