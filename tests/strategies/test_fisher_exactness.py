"""Where K-FAC is exact, and what its step does not depend on: oracles in float64 beside those of test_curvature."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.engines import make_worker
from strategies.backprop import Backprop
from strategies.contract import Clock, Phase
from strategies.curvature.blocks import EigenBlock, KroneckerBlock, block
from strategies.curvature.layers import AnyLayer, NormLayer, served
from strategies.natural_gradient import NaturalGradient
from strategies.optimizers import Sgd
from strategies.rate import Rate
from tests.strategies.harness import Blobs, baseline, tiny_net
from tests.strategies.test_curvature import close, curvature, eye, kron, outer, randn, seen


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def gradients(net: nn.Module, layer: AnyLayer, x: Tensor, outputs: Any) -> list[Tensor]:
    """Of each example's own loss, for the layer's matrix."""
    found = []
    for n in range(len(x)):
        net.zero_grad()
        outputs(net(x[n : n + 1]), n).backward()
        found.append(layer.matrix().clone())
    return found


def test_a_deep_linear_network_with_a_square_loss_has_exact_blocks() -> None:
    """Each layer's G (x) A is its block of the Gauss-Newton matrix, which has no labels in it; the empirical one is not."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)).double()
    x, target = randn(7, 4), randn(7, 2)
    for layer in served(net):
        assert not isinstance(layer, NormLayer)
        own = block(layer, "cholesky", False)
        exact, g = torch.zeros(()), torch.zeros(())
        for c in range(2):  # the Hessian in the outputs is 1
            exact = exact + outer(gradients(net, layer, x, lambda y, n, c=c: y[0, c]))
            xs, grads = _calls(net, layer, x, lambda y, c=c: y[:, c].sum())
            a, g = own.statistic("a", xs, grads, 1.0) / 7, g + own.statistic("g", xs, grads, 1.0) / 7
        assert close(kron({"a": a, "g": g}), exact)
        xs, grads = _calls(net, layer, x, lambda y: (y - target).square().sum() / 2)
        empirical = kron({name: own.statistic(name, xs, grads, 1.0) / 7 for name in "ag"})
        assert not close(empirical, exact, 0.1)
        true_empirical = outer(gradients(net, layer, x, lambda y, n: (y[0] - target[n]).square().sum() / 2))
        assert not close(empirical, true_empirical, 0.01)


def _calls(net: nn.Module, layer: AnyLayer, x: Tensor, loss: Any) -> tuple[list[Tensor], list[Tensor]]:
    return next(calls for one, calls in seen(net, x, loss).items() if one.module is layer.module)


def test_corrected_eigenvalues_give_the_matrix_itself_in_its_own_basis() -> None:
    """One example without shared weights: F = g g^T (x) a a^T has Kronecker-factored eigenvectors."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = randn(1, 4), torch.tensor([1])
    for layer, (xs, grads) in seen(net, x, lambda out: nn.functional.cross_entropy(out, y)).items():
        own = block(layer, "ekfac", False)
        assert isinstance(own, EigenBlock)
        inverse = own.invert(curvature(own, xs, grads, 1), 0.0)
        basis = torch.kron(inverse["g_basis"][0], inverse["a_basis"][0])
        corrected = basis @ own.scales(inverse, xs, grads, 1.0)[0].flatten().diag() @ basis.T
        assert close(corrected, outer([layer.matrix()]))


def test_without_damping_the_step_does_not_depend_on_the_basis_of_the_inputs() -> None:
    """Inputs M x with weights W M^-1 are the same function, and stay it after a step; a plain gradient step tears it apart."""
    turn, x, target = randn(4, 4) + 3 * eye(4), randn(12, 4), randn(12, 3)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    twin = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        twin[0].weight.copy_(net[0].weight @ torch.linalg.inv(turn))
    pairs = ((net, x), (twin, x @ turn.T))
    assert close(net(x).detach(), twin(x @ turn.T).detach())
    for natural in (True, False):
        one, other = (_moved(each, inputs, target, natural) for each, inputs in pairs)
        assert close(one, other, 1e-8) == natural


def _moved(net: nn.Module, x: Tensor, target: Tensor, natural: bool) -> Tensor:
    """Outputs after a step of 0.1 from the weights that are put back."""
    kept = {name: t.clone() for name, t in net.state_dict().items()}
    for layer, (xs, grads) in seen(net, x, lambda y: (y - target).square().sum() / len(x)).items():
        own = block(layer, "cholesky", False)
        grad, inverse = layer.matrix(), own.invert(curvature(own, xs, grads, len(x)), 1e-24)
        layer.write(own.apply(inverse, grad, 1e-24) if natural else grad)
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad  # type: ignore[operator]
        found = net(x)
    net.load_state_dict(kept)
    return found


def ones(own: KroneckerBlock, name: str, xs: list[Tensor], grads: list[Tensor], scale: float) -> Tensor:
    """A sum over 12 examples whose mean is 1."""
    return 12 * eye(own.factors[name].sizes[-1])[None]


@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
def test_where_both_factors_are_1_it_is_sgd_with_momentum(inverse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a constant rate, also with momentum that is tied to it."""
    monkeypatch.setattr(KroneckerBlock, "statistic", ones)

    def usual(phase: Phase) -> Phase:
        return dataclasses.replace(phase, learner=Backprop(optimizer=Sgd(momentum=0.9), rate=Rate(0.1)))

    natural = NaturalGradient(damping=1e-30, kl_clip=0.0, tie_momentum=True, inverse=inverse)
    ends = []
    for plan in (baseline().map(usual), natural.edit(baseline().map(usual))):
        torch.manual_seed(0)
        net, made = tiny_net((6,), 3).double(), plan.phases[0].learner
        state = made.init(net, make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")))
        for step in range(4):
            made.step(state, [Blobs().train(12 * step, 12 * step + 12)], Clock(step, 4, 0.0, 0.25, 12, seed=0))
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.allclose(ends[0], ends[1], atol=1e-12, rtol=0)
