"""Oracles of curvature in float64: Fisher matrices by hand, inverses in closed form, what travels and where it goes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strategies.contract import PlanError
from strategies.curvature import inverses
from strategies.curvature.blocks import Block, EigenBlock, block
from strategies.curvature.buckets import Shape, pack, unpack
from strategies.curvature.capture import watched
from strategies.curvature.gram import gram, slides, square
from strategies.curvature.layers import AnyLayer, NormLayer, served
from strategies.curvature.placement import Placement, place
from strategies.curvature.refresh import next_interval

TIGHT = 1e-12


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randn(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = TIGHT) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def seen(net: nn.Module, x: Tensor, loss: Any) -> dict[AnyLayer, tuple[list[Tensor], list[Tensor]]]:
    """Inputs and output gradients of the calls of each layer, after a backward pass."""
    found: dict[AnyLayer, tuple[list[Tensor], list[Tensor]]] = {}
    net.zero_grad()
    with watched(served(net), lambda layer, xs, grads: found.__setitem__(layer, (xs, grads))):
        loss(net(x)).backward()
    return found


def curvature(block: Block, xs: list[Tensor], grads: list[Tensor], n: int) -> dict[str, Tensor]:
    """Mean factors of a mean loss over n examples."""
    return {name: block.statistic(name, xs, grads, n) / n for name in block.factors}


def kron(factors: dict[str, Tensor]) -> Tensor:
    return torch.kron(factors["g"][0], factors["a"][0])


def outer(gradients: list[Tensor]) -> Tensor:
    """Mean of v v^T over gradient matrices."""
    rows = torch.stack([g.flatten() for g in gradients])
    return rows.T @ rows / len(rows)


# ---------------------------------------------------------------------------------------------------------------- layers


CONVOLUTIONS = [
    {"stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": (3, 2), "dilation": (1, 2), "padding": "same", "bias": False},
    {"kernel_size": 2, "padding": (1, 0), "groups": 4, "padding_mode": "circular"},
    {"kernel_size": 1, "bias": False},
    {"padding": "same"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_rows_of_a_convolution_make_its_gradient(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 8, **({"kernel_size": 3} | options)).double()
    (layer,) = served(nn.Sequential(conv))
    assert not isinstance(layer, NormLayer)
    ((xs, grads),) = seen(nn.Sequential(conv), randn(5, 4, 8, 7), lambda y: (y * y.detach().sin()).sum()).values()
    made = torch.einsum("gnto,gnti->goi", layer.outputs(grads[0]), layer.inputs(xs[0]))
    assert close(made, layer.matrix())
    assert layer.sizes == made.shape
    assert close(layer.summed(xs[0]), layer.inputs(xs[0]).sum(2))
    assert all(torch.equal(p.grad, part) for p, part in zip(layer.parameters, layer.split(layer.matrix()), strict=True))
    before = layer.matrix().clone()
    layer.write(2 * before)
    assert torch.equal(layer.matrix(), 2 * before)


def test_a_linear_layer_takes_what_lies_between_for_positions() -> None:
    linear = nn.Linear(3, 2).double()
    ((layer, (xs, grads)),) = seen(nn.Sequential(linear), randn(4, 5, 3), lambda y: y.square().sum()).items()
    assert not isinstance(layer, NormLayer)
    assert layer.inputs(xs[0]).shape == (1, 4, 5, 4)
    assert close(torch.einsum("gnto,gnti->goi", layer.outputs(grads[0]), layer.inputs(xs[0])), layer.matrix())


def test_calls_of_a_shared_layer_come_together() -> None:
    linear = nn.Linear(3, 3).double()
    calls = seen(nn.Sequential(linear, nn.Tanh(), linear), randn(4, 3), lambda y: y.square().sum())
    ((layer, (xs, grads)),) = calls.items()
    assert not isinstance(layer, NormLayer)
    a, g = torch.cat([layer.inputs(x) for x in xs], 2), torch.cat([layer.outputs(grad) for grad in grads], 2)
    assert close(torch.einsum("gnto,gnti->goi", g, a), layer.matrix())


def test_a_change_in_place_behind_a_layer_is_no_matter() -> None:
    conv = nn.Conv2d(2, 3, 3).double()
    x = randn(4, 2, 5, 5)
    ((_, grads),) = seen(nn.Sequential(conv, nn.ReLU(inplace=True)), x, lambda y: y.square().sum()).values()
    assert close(grads[0], 2 * conv(x).relu().detach())


def test_what_is_served() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    shared, frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    twin = nn.Linear(2, 2)
    twin.weight = shared.weight
    shifted = nn.BatchNorm1d(2)
    shifted.weight.requires_grad_(False)
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    net = nn.Sequential(nn.Linear(2, 2), Own(2, 2), shared, twin, frozen, shifted, normed, nn.LayerNorm(2))
    assert [layer.name for layer in served(net)] == ["0", "5"]
    assert served(net)[1].parameters == [shifted.bias]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(5, 4), (1, 1), (2, 3), (1, 4)], ids=str)
def test_shifts_are_rows(bias: bool, size: tuple[int, int]) -> None:
    (layer,) = served(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=bias).double()))
    assert not isinstance(layer, NormLayer) and slides(layer)
    x = randn(6, 3, *size)
    assert close(gram(layer, x), square(layer.inputs(x).flatten(1, 2)))
    assert close(layer.summed(x), layer.inputs(x).sum(2))


# --------------------------------------------------------------------------------------------------------------- factors


def test_one_example_without_shared_weights_is_exact() -> None:
    """G (x) A is the example's own g g^T (x) a a^T."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    for layer, (xs, grads) in seen(
        net, randn(1, 4), lambda y: nn.functional.cross_entropy(y, torch.tensor([1]))
    ).items():
        assert not isinstance(layer, NormLayer)
        assert close(kron(curvature(block(layer, "cholesky", False), xs, grads, 1)), outer([layer.matrix()]))


@pytest.mark.parametrize("reduce", [False, True])
def test_a_repeated_batch_has_the_same_factors(reduce: bool) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = randn(5, 2, 4, 4), torch.tensor([0, 1, 2, 1, 0])
    once = seen(net, x, lambda out: nn.functional.cross_entropy(out, y))
    thrice = seen(net, x.repeat(3, 1, 1, 1), lambda out: nn.functional.cross_entropy(out, y.repeat(3)))
    for layer in served(net):
        own = block(layer, "cholesky", reduce)
        by_name = {one.name: calls for one, calls in once.items()}, {one.name: calls for one, calls in thrice.items()}
        few, many = (curvature(own, *calls[layer.name], n) for calls, n in zip(by_name, (5, 15), strict=True))
        assert all(close(few[name], many[name]) for name in own.factors)


def gauss_newton(
    net: nn.Module, conv: nn.Conv2d, x: Tensor, outputs: Any
) -> tuple[Tensor, dict[bool, dict[str, Tensor]]]:
    """Of a square loss, for a convolution's matrix: the exact one, and the factors of expand and reduce."""
    gradients, sums = [], {False: {}, True: {}}  # type: ignore[var-annotated]
    classes = outputs(net(x[:1])).shape[1]
    layer = next(layer for layer in served(net) if layer.module is conv)
    for c in range(classes):
        for n in range(len(x)):
            net.zero_grad()
            outputs(net(x[n : n + 1]))[0, c].backward()
            gradients.append(layer.matrix().clone())
        calls = seen(net, x, lambda y, c=c: outputs(y)[:, c].sum())
        xs, grads = next(found for one, found in calls.items() if one.module is conv)
        for reduce, own in sums.items():
            made = block(layer, "cholesky", reduce)
            own["a"] = made.statistic("a", xs, grads, 1.0) / len(x)
            own["g"] = own.get("g", 0) + made.statistic("g", xs, grads, 1.0) / len(x)
    return outer(gradients) * classes, sums


def test_reduce_is_exact_before_a_global_mean() -> None:
    conv, head = nn.Conv2d(2, 3, 2).double(), nn.Linear(3, 2).double()
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    exact, factors = gauss_newton(net, conv, randn(4, 2, 4, 3), lambda y: y)
    assert close(kron(factors[True]), exact)
    assert not close(kron(factors[False]), exact, 0.1)


def test_expand_is_exact_where_positions_have_losses_of_their_own() -> None:
    conv = nn.Conv2d(2, 3, 2).double()
    net = nn.Sequential(conv, nn.Conv2d(3, 2, 1).double())
    exact, factors = gauss_newton(net, conv, randn(4, 2, 4, 3), lambda y: y.flatten(1))
    assert close(kron(factors[False]), exact)
    assert not close(kron(factors[True]), exact, 0.1)


@pytest.mark.parametrize("gamma", [1.3, 0.0])
def test_the_block_of_a_batch_norm_is_the_fisher_matrix_of_its_examples(gamma: float) -> None:
    norm = nn.BatchNorm2d(3).double()
    nn.init.constant_(norm.weight, gamma)
    x, target = randn(6, 3, 2, 2), randn(6, 3, 2, 2)
    ((layer, (xs, grads)),) = seen(nn.Sequential(norm), x, lambda y: (y - target).square().sum() / 6).items()
    own = block(layer, "cholesky", False)
    f = curvature(own, xs, grads, 6)["f"]
    normal = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + norm.eps).sqrt()
    g = 2 * (gamma * normal - target)  # with zero shift
    each = torch.stack([(g * normal).sum((2, 3)), g.sum((2, 3))], -1)  # (n, channels, 2)
    assert close(f, torch.einsum("nci,ncj->cij", each, each) / 6)
    new = own.apply(own.invert({"f": f}, 0.1), layer.matrix(), 0.1)
    by_hand = torch.linalg.inv(f + 0.1 * torch.eye(2, dtype=torch.float64)) @ layer.matrix()[..., None]
    assert close(new, by_hand[..., 0])


def test_parts_of_a_batch_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = randn(7, 2, 5, 5), torch.tensor([0, 1, 2, 1, 0, 2, 2])
    for layer, (xs, grads) in seen(net, x, lambda out: nn.functional.cross_entropy(out, y)).items():
        own = block(layer, "ekfac", False)
        assert isinstance(own, EigenBlock)
        inverse = own.invert(curvature(own, xs, grads, 7), 0.1)
        whole = own.statistic("a", xs, grads, 7.0), own.scales(inverse, xs, grads, 7.0)
        with monkeypatch.context() as patch:
            patch.setattr("strategies.curvature.gram.LARGEST", 200)
            parts = own.statistic("a", xs, grads, 7.0), own.scales(inverse, xs, grads, 7.0)
        assert all(close(a, b) for a, b in zip(parts, whole, strict=True))


def test_a_batch_norm_that_does_not_train_normalises_by_what_it_keeps() -> None:
    norm = nn.BatchNorm1d(2).double().eval()
    norm.running_mean.copy_(torch.tensor([1.0, -2.0]))  # type: ignore[union-attr]
    (layer,), x, grad = served(nn.Sequential(norm)), randn(4, 2), randn(4, 2)
    assert isinstance(layer, NormLayer)
    normal = (x - torch.tensor([1.0, -2.0])) / (1 + norm.eps) ** 0.5
    assert close(layer.gradients(x, grad), torch.stack([grad * normal, grad], -1))


# -------------------------------------------------------------------------------------------------------------- inverses


def factors(into: int = 4, out: int = 3, groups: int = 2) -> tuple[Tensor, Tensor]:
    return square(randn(groups, 20, into)), square(randn(groups, 20, out)) / 20


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def test_damping_is_shared_out_by_pi() -> None:
    a, g = factors()
    pi, root = inverses.balance(a, g)[0], 0.3
    product = torch.kron(g[0] + root / pi * eye(3), a[0] + pi * root * eye(4))
    terms = torch.kron(g[0], a[0]) + pi * root * torch.kron(g[0], eye(4)) + root / pi * torch.kron(eye(3), a[0])
    assert close(product, terms + root**2 * eye(12))
    assert float(pi) == pytest.approx(math.sqrt((a[0].trace() / 4) / (g[0].trace() / 3)), rel=TIGHT)
    made = torch.kron(*(f[0] for f in inverses.factored(a, g, root**2)[::-1]))
    assert close(made, torch.linalg.inv(product))


def solved(matrix: Tensor, grad: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, grad.flatten()).view_as(grad)


def test_eigenvectors_damp_exactly() -> None:
    a, g = factors()
    (in_a, qa), (in_g, qg) = inverses.eigenbasis(a), inverses.eigenbasis(g)
    grad = randn(2, 3, 4)
    new = inverses.by_basis(grad, qa, qg, in_g[..., None] * in_a[..., None, :], 0.2)
    for group in range(2):
        assert close(new[group], solved(torch.kron(g[group], a[group]) + 0.2 * eye(12), grad[group]), 1e-10)


def test_cholesky_and_eigenvectors_agree_where_damping_is_shared_out_alike() -> None:
    a, g = factors()
    pi, grad = inverses.balance(a, g)[:, None, None], randn(2, 3, 4)
    by_cholesky = inverses.by_factors(grad, *inverses.factored(a, g, 0.2))
    damped = inverses.eigenbasis(a + pi * 0.2**0.5 * eye(4)), inverses.eigenbasis(g + 0.2**0.5 / pi * eye(3))
    (in_a, qa), (in_g, qg) = damped
    assert close(by_cholesky, inverses.by_basis(grad, qa, qg, in_g[..., None] * in_a[..., None, :], 0.0))


def test_large_damping_gives_the_gradient_and_none_is_free_of_scale() -> None:
    a, g = factors()
    grad = randn(2, 3, 4)
    assert close(1e16 * inverses.by_factors(grad, *inverses.factored(a, g, 1e16)), grad, 1e-6)
    plain = inverses.by_factors(grad, *inverses.factored(a, g, 1e-24))
    scaled = inverses.by_factors(7 * grad, *inverses.factored(a, 49 * g, 1e-24))  # the loss times 7
    assert close(scaled, plain / 7, 1e-9)


def test_a_singular_factor_gives_no_number_instead_of_an_error() -> None:
    none = torch.zeros(2, dtype=torch.float64)
    found = inverses.inverse(torch.stack([torch.zeros_like(eye(3)), eye(3)]), none)
    assert found[0].isnan().all() and torch.equal(found[1], eye(3))
    assert inverses.inverse(-eye(3)[None], none[:1]).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_of_zeros_has_an_inverse(dtype: torch.dtype) -> None:
    """That of a convolution before a batch norm whose scale begins at zero."""
    a, g = (f.to(dtype) for f in factors())
    assert all(f.isfinite().all() for f in inverses.factored(a, 0 * g, 1e-3))
    assert all(f.isfinite().all() for f in inverses.factored(0 * a, g, 1e-3))


def test_one_step_of_linear_regression_is_newtons() -> None:
    """With A exact and G = I, a step of rate 1 from anywhere ends at the least-squares solution."""
    x, y, w = randn(20, 4), randn(20, 3), randn(3, 4)
    a, grad = x.T @ x / 20, (w @ x.T - y.T) @ x / 20
    new = inverses.by_factors(grad[None], *inverses.factored(a[None], eye(3)[None], 1e-28))
    assert close(w - new[0], torch.linalg.lstsq(x, y).solution.T, 1e-10)


def test_corrected_eigenvalues_are_the_best_along_the_basis() -> None:
    """|F - EKFAC| <= |F - KFAC|, and the corrected scale is the diagonal of F in the basis (George et al. 2018)."""
    net = nn.Sequential(nn.Conv2d(2, 3, 2).double(), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3).double())
    x, y = randn(6, 2, 3, 3), torch.tensor([0, 1, 2, 1, 0, 2])
    layer = served(net)[0]
    assert not isinstance(layer, NormLayer)
    gradients = []
    for n in range(6):
        net.zero_grad()
        nn.functional.cross_entropy(net(x[n : n + 1]), y[n : n + 1]).backward()
        gradients.append(layer.matrix().clone())
    exact = outer(gradients)
    calls = seen(net, x, lambda out: nn.functional.cross_entropy(out, y))
    xs, grads = next(found for one, found in calls.items() if one.module is layer.module)
    own = block(layer, "ekfac", False)
    assert isinstance(own, EigenBlock)
    mean = curvature(own, xs, grads, 6)
    inverse = own.invert(mean, 0.0)
    basis = torch.kron(inverse["g_basis"][0], inverse["a_basis"][0])
    scale = own.scales(inverse, xs, grads, 6.0)[0].flatten() / 6
    assert close(scale, (basis.T @ exact @ basis).diagonal())
    corrected = basis @ scale.diag() @ basis.T
    assert (exact - corrected).norm() < (exact - kron(mean)).norm()


# ------------------------------------------------------------------------------------------------------- who does what


@pytest.mark.parametrize("d", [1, 2, 3, 6, 7])
def test_packing_and_back(d: int) -> None:
    shapes = [Shape((2, d, d), symmetric=True), Shape((3, 2)), Shape((2, d, d))]
    tensors = [square(randn(2, 5, d)), randn(3, 2), randn(2, d, d)]
    flat = pack(tensors, shapes)
    assert len(flat) == d * (d + 1) + 6 + 2 * d * d == sum(shape.numel for shape in shapes)
    assert all(torch.equal(a, b) for a, b in zip(unpack(flat, shapes), tensors, strict=True))


def test_packed_sums_are_sums() -> None:
    shape = [Shape((1, 5, 5), symmetric=True)]
    a, b = square(randn(1, 9, 5)), square(randn(1, 9, 5))
    assert close(unpack(pack([a], shape) + pack([b], shape), shape)[0], a + b)


def test_the_dearest_layers_go_first_to_who_has_least_to_do() -> None:
    assert place([1, 8, 4, 3, 2], 2, 1.0) == Placement(2, 1, (0, 0, 1, 1, 1))
    assert place([1.0] * 4, 4, 0.25).owners == (0, 1, 2, 3)


@pytest.mark.parametrize(("size", "fraction"), [(1, 1.0), (4, 1.0), (4, 0.5), (4, 0.25), (6, 1 / 3)])
def test_columns_hold_and_rows_exchange(size: int, fraction: float) -> None:
    placed = place([5, 4, 3, 2, 1, 1, 1], size, fraction)
    workers = max(1, round(size * fraction))
    for rank in range(size):
        column, row = placed.column(rank), placed.row(rank)
        assert len(column) == workers and len(row) == size // workers
        assert rank in column and rank in row
        for other in row:
            assert len(set(placed.column(other)) & set(row)) == 1
    assert {rank for r in range(size) for rank in placed.row(r)} == set(range(size))


def test_gradient_workers_divide_the_workers() -> None:
    with pytest.raises(PlanError, match="of 4 workers is 3, which does not divide 4"):
        place([1.0], 4, 0.75)


def test_intervals_grow_like_fibonaccis_numbers_and_are_halved() -> None:
    last, before, grown = 1, 1, []
    for _ in range(5):
        last, before = next_interval(last, before, True, True), last
        grown.append(last)
    assert grown == [2, 3, 5, 8, 13]
    assert next_interval(8, 5, True, False) == 8
    assert [next_interval(n, 1, False, False) for n in (8, 5, 1)] == [4, 2, 1]
    assert list(itertools.accumulate([1] * 3, lambda n, _: next_interval(n, 1, False, True))) == [1, 1, 1]
