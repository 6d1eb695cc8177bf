"""Oracles of Shampoo: dense Kronecker products, closed forms of one gradient, invariances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.linalg import fractional_matrix_power
from torch import Tensor, nn

from strategies.contract import Need, PlanError
from strategies.net import Net
from strategies.optimizers import Sgd
from strategies.shampoo import Preconditioned, Shampoo, direction
from tests.strategies.cases import with_adamw
from tests.strategies.harness import baseline


def gradients(n: int, rows: int = 4, columns: int = 6) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, columns, dtype=torch.float64) for _ in range(n)]


def walk(seen: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """What SGD takes for each gradient, without grafting unless asked for, the powers computed at each step."""
    state: dict[str, Any] = {}
    shampoo = Shampoo(**{"graft": "none", "every": 1} | options)
    return [direction(g, state, shampoo) for g in seen]


def power(mean: Tensor, p: float, eps: float) -> Tensor:
    damped = mean + eps * torch.linalg.eigvalsh(mean)[-1] * torch.eye(len(mean), dtype=torch.float64)
    return torch.tensor(fractional_matrix_power(damped.numpy(), -p).real)


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_the_step_is_that_of_the_dense_preconditioner(p: float) -> None:
    """(L x R)^-p vec G, with L and R weighted means over all gradients."""
    seen, beta, eps = gradients(5), 0.8, 1e-3
    weights = torch.tensor([beta ** (4 - i) for i in range(5)], dtype=torch.float64)
    weights /= weights.sum()
    left = sum(w * g @ g.T for w, g in zip(weights, seen, strict=True))
    right = sum(w * g.T @ g for w, g in zip(weights, seen, strict=True))
    dense = torch.kron(power(left, p, eps), power(right, p, eps))  # type: ignore[arg-type]
    expected = (dense @ seen[-1].flatten()).view(4, 6)
    assert torch.allclose(walk(seen, beta=beta, eps=eps, power=p)[-1], expected, atol=1e-12, rtol=1e-11)


def test_one_gradient_becomes_orthogonal() -> None:
    """L^-1/4 G R^-1/4 = U V' of G = U S V'."""
    g = gradients(1)[0]
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert torch.allclose(walk([g], eps=1e-14)[0], u @ v, atol=1e-10, rtol=0)


def test_one_side_alone_takes_twice_the_power() -> None:
    """(G G')^-1/2 G = U V' again: six columns are too many."""
    g = gradients(1)[0]
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert torch.allclose(walk([g], largest=5, eps=1e-14)[0], u @ v, atol=1e-10, rtol=0)
    assert torch.equal(walk([g], largest=3)[0], g)


def test_the_scale_of_the_loss_is_nothing() -> None:
    seen = gradients(3)
    louder = walk([1000 * g for g in seen])
    assert torch.allclose(louder[-1], walk(seen)[-1], atol=0, rtol=1e-11)


def test_rotations_of_rows_and_columns_go_through() -> None:
    seen, q, r = gradients(3), *(torch.linalg.qr(g @ g.T).Q for g in (gradients(1)[0], gradients(1, 6, 6)[0]))
    turned = walk([q @ g @ r for g in seen])
    assert torch.allclose(turned[-1], q @ walk(seen)[-1] @ r, atol=1e-11, rtol=0)


def test_powers_are_computed_every_so_often() -> None:
    """In between, the last ones are used. Six columns of rank four: a small eps would multiply what rounding makes of zeros."""
    eps = 1e-2
    first, *rest = gradients(3)
    stale = walk([first, *rest], every=3, eps=eps)
    left, right = (power(m, 0.25, eps) for m in (first @ first.T, first.T @ first))
    for g, step in zip(rest, stale[1:], strict=True):
        assert torch.allclose(step, left @ g @ right, atol=1e-12, rtol=0)
    assert not torch.allclose(walk([first, *rest])[-1], stale[-1], atol=1e-3)
    assert torch.allclose(walk([first, *rest], every=2)[-1], walk([first, *rest])[-1], atol=1e-14, rtol=0)


def test_grafting_takes_the_length_alone() -> None:
    seen, own = gradients(3), walk(gradients(3))[-1]
    grafted = walk(seen, graft="sgd")[-1]
    assert grafted.norm().item() == pytest.approx(seen[-1].norm().item(), rel=1e-14)
    assert torch.allclose(grafted / grafted.norm(), own / own.norm(), atol=1e-14, rtol=0)
    squares = (0.25 * seen[0] ** 2 + 0.5 * seen[1] ** 2 + seen[2] ** 2) / 1.75
    other = walk(seen, graft="rmsprop", beta=0.5)[-1]
    assert other.norm().item() == pytest.approx((seen[-1] / (squares.sqrt() + 1e-8)).norm().item(), rel=1e-14)


def test_a_gradient_of_zeros_is_a_step_of_zeros() -> None:
    for graft in ("none", "sgd", "rmsprop"):
        assert torch.equal(walk([torch.zeros(3, 2)], graft=graft)[0], torch.zeros(3, 2))


def test_a_gradient_that_is_no_number_stays_none() -> None:
    """It raises nothing: a trial that has diverged ends by its loss."""
    assert walk([torch.full((3, 2), torch.nan)])[0].isnan().all()


def net() -> Net:
    torch.manual_seed(0)
    return Net([nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5)], head=nn.Linear(5, 3)).double()


def moved(made: Any, of: Net, seeds: Sequence[int]) -> dict[str, Tensor]:
    for seed in seeds:
        torch.manual_seed(seed)
        for p in of.parameters():
            p.grad = torch.randn_like(p)
        for group in made.param_groups:
            group["lr"] = 0.1
        made.step()
    return {name: p.detach().clone() for name, p in of.named_parameters()}


MOMENTUM = Sgd(momentum=0.9, weight_decay=0.01)


def optimizer(of: Net, base: Sgd = MOMENTUM, **options: Any) -> torch.optim.Optimizer:
    return Preconditioned(base, Shampoo(**options))(of)


def test_biases_are_sgds_and_convolutions_are_matrices() -> None:
    plain_net, own_net = net(), net()
    plain = moved(MOMENTUM(plain_net), plain_net, (1, 2))
    own = moved(optimizer(own_net), own_net, (1, 2))
    assert all(torch.equal(plain[name], own[name]) == name.endswith("bias") for name in plain)
    of = net()
    before = of.stages[0].weight.detach().clone()
    step = before - moved(optimizer(of, Sgd(), graft="none"), of, (1,))["stages.0.weight"]
    torch.manual_seed(1)
    g = torch.randn_like(before).view(2, 9)
    assert torch.allclose(step.view(2, 9) / 0.1, walk([g])[0], atol=1e-13, rtol=0)


def test_state_survives() -> None:
    whole, broken = net(), net()
    once = optimizer(broken, graft="rmsprop", every=2)
    moved(once, broken, (1, 2, 3))
    again = optimizer(broken, graft="rmsprop", every=2)
    again.load_state_dict(once.state_dict())
    resumed, unbroken = (
        moved(again, broken, (4,)),
        moved(optimizer(whole, graft="rmsprop", every=2), whole, (1, 2, 3, 4)),
    )
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_refusals() -> None:
    with pytest.raises(PlanError, match="shampoo changes the gradients of sgd, but the optimizer is AdamW"):
        Shampoo().edit(with_adamw(baseline()))
    assert Need.LAYER_GRADS in Shampoo().edit(baseline()).needs
