"""Oracles of Fisher-orthogonal projection: dense Fisher matrices, the closed form for F = I, halves by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.engines import make_worker
from strategies.backprop import Backprop
from strategies.contract import Clock, Phase, Plan, PlanError
from strategies.curvature.blocks import Block, block
from strategies.curvature.layers import served
from strategies.fop import Fop
from strategies.loss_smoothing import LossSmoothing
from strategies.natural_gradient import NaturalGradient
from strategies.net import Net
from strategies.optimizers import Sgd
from strategies.parts.fisher_projection import Halves, combination, times_fisher
from strategies.rate import Rate
from tests.strategies.cases import with_natural_gradient
from tests.strategies.harness import CLASSES, WIDTH, Blobs, baseline, distance, tiny_net, train

DAMPING = 0.3
KINDS = ("cholesky", "eigen", "ekfac", "norm")


def a_block(kind: str) -> tuple[Block, dict[str, Tensor]]:
    """A layer's block and its inverse, of random factors."""
    torch.manual_seed(1)
    net = Net([nn.Linear(3, 4), nn.BatchNorm1d(4)]).double()
    own = block(served(net)[kind == "norm"], "cholesky" if kind == "norm" else kind, False)  # type: ignore[arg-type]
    roots = {name: torch.randn(shape.sizes, dtype=torch.float64) for name, shape in own.factors.items()}
    return own, own.invert({name: root @ root.mT for name, root in roots.items()}, DAMPING)


def gradients(own: Block) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    sizes = own.factors["f"].sizes[:2] if "f" in own.factors else (1, 4, 4)
    return torch.randn(sizes, dtype=torch.float64), torch.randn(sizes, dtype=torch.float64)


def dense(own: Block, inverse: dict[str, Tensor], like: Tensor) -> Tensor:
    """F^-1 as a matrix, column by column."""
    units = torch.eye(like.numel(), dtype=torch.float64)
    return torch.stack([own.apply(inverse, unit.view(like.shape), DAMPING).flatten() for unit in units], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fisher_matrix_undoes_its_inverse(kind: str) -> None:
    own, inverse = a_block(kind)
    g, _ = gradients(own)
    assert torch.allclose(times_fisher(own, inverse, own.apply(inverse, g, DAMPING), DAMPING), g, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_those_of_the_dense_matrix(kind: str) -> None:
    """d' is orthogonal to g under F; beta and eta are where the quadratic model has no slope."""
    own, inverse = a_block(kind)
    (g, d), inverted = gradients(own), dense(own, inverse, gradients(own)[0])
    fisher, g, d = inverted.inverse(), g.flatten(), d.flatten()
    rest = d - (d @ fisher @ g) / (g @ fisher @ g) * g
    assert rest @ fisher @ g == pytest.approx(0, abs=1e-10)

    def slope(direction: Tensor, size: float) -> float:
        """Of -x g.F^-1 v + x^2 / 2 v.F^-1 v at x."""
        x = torch.tensor(size, dtype=torch.float64, requires_grad=True)
        model = -x * (g @ inverted @ direction) + x**2 / 2 * (direction @ inverted @ direction)
        return float(torch.autograd.grad(model, x)[0])

    of_mean, of_difference = combination(own, inverse, *gradients(own), DAMPING, layer_steps=False)
    beta = float(of_difference)
    assert slope(rest, beta) == pytest.approx(0, abs=1e-6 * abs(slope(rest, 0)))  # but for what makes halves alike
    together = of_mean * g + of_difference * d
    assert torch.allclose(together, g + beta * rest, atol=1e-12, rtol=0)
    scaled = combination(own, inverse, *gradients(own), DAMPING)
    eta = float(scaled[1] / of_difference)
    assert torch.allclose(scaled, eta * torch.stack([of_mean, of_difference]), atol=1e-12, rtol=0)
    assert slope(together, eta) == pytest.approx(0, abs=1e-10)


def test_by_hand_where_the_fisher_matrix_is_1() -> None:
    """g = (2, 0, ..), d = (1, 3, ..): s = 1/2, d' = (0, 3), orthogonal to g, so beta = 0 and eta = 1."""
    own, _ = a_block("cholesky")
    unit = {name: torch.eye(4, dtype=torch.float64)[None] for name in own.inverses}
    g, d = (torch.zeros(1, 4, 4, dtype=torch.float64) for _ in range(2))
    g[0, 0, :2], d[0, 0, :2] = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    assert combination(own, unit, g, d, 0.0).tolist() == pytest.approx([1.0, 0.0], abs=1e-15)


def test_by_hand_where_the_fisher_matrix_is_diagonal() -> None:
    """F^-1 = diag(1, 1/2), g = (1, 1), d = (1, 0): s = 1/3, d' = (2, -1)/3, beta = (1/2) / (1/2) = 1,
    c = (5, 2)/3, eta = (5/3 + 1/3) / (25/9 + 2/9) = 2/3."""
    own, _ = a_block("cholesky")
    inverse = {"g_inverse": torch.eye(4, dtype=torch.float64)[None]}
    inverse["a_inverse"] = torch.diag(torch.tensor([1.0, 0.5, 1.0, 1.0], dtype=torch.float64))[None]
    g, d = (torch.zeros(1, 4, 4, dtype=torch.float64) for _ in range(2))
    g[0, 0, :2], d[0, 0, 0] = 1.0, 1.0
    found = combination(own, inverse, g, d, 0.0)
    assert found.tolist() == pytest.approx([2 / 3 * (1 - 1 / 3), 2 / 3], rel=1e-7)
    weaker = combination(own, inverse, g, d, 0.0, strength=0.5, layer_steps=False)
    assert weaker.tolist() == pytest.approx([1 - 0.5 / 3, 0.5], rel=1e-7)


def test_halves_that_are_alike_but_for_rounding_add_nothing() -> None:
    own, inverse = a_block("cholesky")
    g, d = gradients(own)
    for scale in (0.0, 1e-16, 1e-7):
        of_mean, of_difference = combination(own, inverse, g, scale * d, DAMPING)
        assert of_mean.item() == pytest.approx(1, abs=1e-5)
        assert abs(of_difference * scale) < 1e-4


def test_an_inverse_that_is_no_number_leaves_the_gradient() -> None:
    own, inverse = a_block("cholesky")
    spoilt = {name: t * torch.nan for name, t in inverse.items()}
    assert combination(own, spoilt, *gradients(own), DAMPING).tolist() == [1.0, 0.0]


# ------------------------------------------------------------------------------------------------------- whole steps


def plan(**options: Any) -> Plan:
    """Plain SGD at rate 0.1 on natural gradients that are not clipped."""

    def simpler(phase: Phase) -> Phase:
        return dataclasses.replace(phase, learner=Backprop(optimizer=Sgd(momentum=0.0), rate=Rate(0.1)))

    return Fop(**options).edit(NaturalGradient(kl_clip=0.0, damping=DAMPING).edit(baseline().map(simpler)))


def half(net: Net, examples: list[int]) -> dict[str, Tensor]:
    """Mean gradient over examples of the stream."""
    data = Blobs().train(0, 12)
    loss = nn.functional.cross_entropy(net(data.x[examples]), data.y[examples])
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))


@pytest.mark.parametrize(
    ("micro", "first", "options"),
    [(6, 6, {}), (5, 7, {"strength": 0.5, "layer_steps": False}), (4, 8, {"strength": 2.0})],
)
def test_a_step_is_the_formula_of_even_and_odd_micro_batches(micro: int, first: int, options: dict[str, Any]) -> None:
    """With the mean over the batch for g, layer by layer, on one worker; 12 = 5 + 5 + 2 = 4 + 4 + 4."""
    torch.manual_seed(0)
    net = tiny_net((WIDTH,), CLASSES).double()
    parts = [(start, min(start + micro, 12)) for start in range(0, 12, micro)]
    halves = [[i for part in parts[parity::2] for i in range(*part)] for parity in (0, 1)]
    assert len(halves[0]) == first
    (g1, g2), g = (half(net, examples) for examples in halves), half(net, list(range(12)))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    learner: Any = plan(**options).phases[0].learner
    state = learner.init(net, make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")))
    learner.step(state, [Blobs().train(*part) for part in parts], Clock(0, 10, 0.0, 0.25, 12, seed=0))
    curvature = next(own.live.curvature for own in state.saved["updates"] if isinstance(own.live, Halves))
    for own in curvature.blocks.values():
        inverse = {part: curvature.kept[f"{own.layer.name}/{part}"] for part in own.inverses}
        names = [f"{own.layer.name}.weight", f"{own.layer.name}.bias"]
        mean, difference = (own.layer.join([t[name] for name in names]) for t in (g, {n: g1[n] - g2[n] for n in g}))
        shares = combination(own, inverse, mean, difference, DAMPING, **options)
        assert abs(shares[1]) > 1e-3
        natural = own.apply(inverse, shares[0] * mean + shares[1] * difference, DAMPING)
        for name, step in zip(names, own.layer.split(natural), strict=True):
            assert torch.allclose(dict(net.named_parameters())[name], before[name] - 0.1 * step, atol=1e-13, rtol=0)


def test_equal_halves_are_natural_gradients(tmp_path: Path) -> None:
    """Each example twice, once in either micro-batch of two: g1 - g2 = 0."""
    plain = with_natural_gradient(baseline(1, 2))
    options: Any = {"data": Blobs(repeat=2), "micro_batch": 1}
    fop = train(Fop().edit(plain), tmp_path / "fop", **options)
    assert distance(fop, train(plain, tmp_path / "plain", **options)) < 1e-12


def test_several_passes_of_a_micro_batch_stay_in_its_half(tmp_path: Path) -> None:
    """Weight noise of next to nothing, in pairs: else its two passes would be taken for the two halves."""
    noise = LossSmoothing(alpha=0, sigma=1e-13, antithetic=True)
    bare, noisy = (
        train(p, tmp_path / name, micro_batch=6) for name, p in (("bare", plan()), ("noisy", noise.edit(plan())))
    )
    assert distance(bare, noisy) < 1e-9


def test_one_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match="fop compares two halves of a batch, but there is one part: add workers, or halve"
    ):
        train(plan(), tmp_path)


def test_natural_gradient_comes_first_and_once() -> None:
    with pytest.raises(PlanError, match="name natural_gradient before it"):
        Fop().edit(baseline())
    with pytest.raises(PlanError, match="name natural_gradient once, and before it"):
        NaturalGradient().edit(plan())
