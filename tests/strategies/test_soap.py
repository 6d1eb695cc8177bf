"""Oracles of SOAP: torch's AdamW on rotated weights, power iteration, invariance to rotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from strategies.contract import Need, PlanError
from strategies.net import Net
from strategies.optimizers import AdamW
from strategies.parts.matrix_sides import sides
from strategies.parts.soap_optimizer import SoapMatrices, turn
from strategies.soap import Soap, SoapAndAdamW
from tests.strategies.cases import with_adamw
from tests.strategies.harness import baseline

RATE, BASE = 0.1, AdamW(beta1=0.8, beta2=0.9, weight_decay=0.2)


def gradients(n: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 6, dtype=torch.float64) for _ in range(n)]


def start() -> nn.Parameter:
    torch.manual_seed(9)
    return nn.Parameter(torch.randn(4, 6, dtype=torch.float64))


def run(optimizer: torch.optim.Optimizer, w: Tensor, seen: Sequence[Tensor]) -> Tensor:
    for g in seen:
        w.grad = g.clone()
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
    return w.detach()


def soap(w: Tensor, every: int = 1000, largest: int = 10, beta: float = 0.7) -> SoapMatrices:
    group = {"params": [w], "weight_decay": BASE.weight_decay}
    return SoapMatrices([group], (BASE.beta1, BASE.beta2), BASE.eps, beta, every, largest)


def adamw(w: Tensor) -> torch.optim.AdamW:
    return torch.optim.AdamW([w], betas=(BASE.beta1, BASE.beta2), eps=BASE.eps, weight_decay=BASE.weight_decay)


def test_without_bases_it_is_adamw() -> None:
    own, plain = start(), start()
    expected = run(adamw(plain), plain, gradients(5))
    assert torch.allclose(run(soap(own, largest=3), own, gradients(5)), expected, atol=1e-14, rtol=0)


def bases(g: Tensor, largest: int = 10) -> dict[str, Tensor]:
    w = start()
    optimizer = soap(w, largest=largest)
    run(optimizer, w, [g])
    return {"right": torch.eye(6).double()} | {side: optimizer.state[w][f"{side}_basis"] for side in sides(g, largest)}


def test_bases_are_first_eigenvectors_of_the_first_gradient() -> None:
    """By falling eigenvalue, so that they make it diagonal, with its singular values."""
    g = gradients(1)[0]
    found = bases(g)
    values = torch.linalg.svdvals(g)
    for side, gram in (("left", g @ g.T), ("right", g.T @ g)):
        diagonal = torch.diag(torch.cat([values**2, values.new_zeros(len(gram) - 4)]))
        assert torch.allclose(found[side].T @ gram @ found[side], diagonal, atol=1e-13, rtol=0)


@pytest.mark.parametrize("largest", [10, 5])
def test_with_bases_that_stay_it_is_adamw_on_rotated_weights(largest: int) -> None:
    """On both sides or on one, without the first gradient."""
    first, *rest = gradients(5)
    w, found = start(), bases(first, largest)
    left, right = found["left"], found["right"]
    rotated = nn.Parameter(left.T @ start().detach() @ right)
    run(adamw(rotated), rotated, [left.T @ g @ right for g in rest])
    expected = left @ rotated.detach() @ right.T
    assert torch.allclose(run(soap(w, largest=largest), w, [first, *rest]), expected, atol=1e-12, rtol=0)


def test_the_first_gradient_moves_nothing() -> None:
    w = start()
    assert torch.equal(run(soap(w), w, gradients(1)), start())


def test_bases_turn_every_so_often_towards_the_eigenvectors() -> None:
    """Of a mean that stays, power iteration finds the eigenvectors; before its first turn the bases stay."""
    w, seen = start(), gradients(2)
    optimizer = soap(w, every=3, beta=0.0)
    run(optimizer, w, seen)
    early = optimizer.state[w]["left_basis"].clone()
    run(optimizer, w, seen[1:])
    assert torch.equal(optimizer.state[w]["left_basis"], early)
    run(optimizer, w, seen[1:])
    assert not torch.equal(optimizer.state[w]["left_basis"], early)
    run(optimizer, w, seen[1:] * 600)
    vectors = torch.linalg.eigh(seen[1] @ seen[1].T).eigenvectors
    assert torch.allclose(
        (optimizer.state[w]["left_basis"].T @ vectors.flip(1)).abs(), torch.eye(4).double(), atol=1e-9
    )


def test_a_turn_orders_basis_and_second_moment_by_eigenvalue() -> None:
    """In a basis of eigenvectors in the wrong order, a turn puts both in order, and changes nothing else."""
    values = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    squares = torch.arange(6, dtype=torch.float64).view(3, 2)
    for side, moment in (("left", squares), ("right", squares.T.clone())):
        state: dict[str, Any] = {f"{side}_basis": torch.eye(3, dtype=torch.float64), "squares": moment}
        turn(state, torch.diag(values), side)
        ordered = squares[[1, 2, 0]]
        assert torch.equal(state["squares"], ordered if side == "left" else ordered.T)
        assert torch.allclose(state[f"{side}_basis"].abs(), torch.eye(3).double()[:, [1, 2, 0]], atol=1e-15, rtol=0)


@pytest.mark.parametrize("bad_at", [0, 1])
def test_a_gradient_that_is_no_number_spoils_the_weights(bad_at: int) -> None:
    """It raises nothing, also not when the bases turn: a trial that has diverged ends by its loss."""
    w, seen = start(), gradients(3)
    seen[bad_at] *= torch.nan
    assert not run(soap(w, every=1), w, seen).isfinite().any()


def test_bases_stay_orthonormal() -> None:
    w = start()
    optimizer = soap(w, every=1)
    run(optimizer, w, gradients(30))
    for side, size in (("left", 4), ("right", 6)):
        basis = optimizer.state[w][f"{side}_basis"]
        assert torch.allclose(basis.T @ basis, torch.eye(size, dtype=torch.float64), atol=1e-14, rtol=0)


def test_rotations_of_rows_go_through() -> None:
    """Unlike AdamW's, SOAP's steps turn with the weights."""
    q = torch.linalg.qr(gradients(1)[0][:, :4]).Q
    for make, goes_through in ((lambda w: soap(w, every=2, largest=5), True), (adamw, False)):
        w, turned = start(), nn.Parameter(q @ start().detach())
        straight = run(make(w), w, gradients(6))
        assert (
            torch.allclose(run(make(turned), turned, [q @ g for g in gradients(6)]), q @ straight, atol=1e-9)
            == goes_through
        )


# --------------------------------------------------------------------------------------------------- with a network


def net() -> Net:
    torch.manual_seed(0)
    return Net([nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5)], head=nn.Linear(5, 3)).double()


def moved(make: Callable[[Net], torch.optim.Optimizer], of: Net, seeds: Sequence[int]) -> dict[str, Tensor]:
    made = make(of)
    for seed in seeds:
        torch.manual_seed(seed)
        for p in of.parameters():
            p.grad = torch.randn_like(p)
        for group in made.param_groups:
            group["lr"] = RATE * group["rate_factor"]
        made.step()
    return {name: p.detach().clone() for name, p in of.named_parameters()}


def test_biases_are_adamws_and_convolutions_are_matrices() -> None:
    plain, own = moved(BASE, net(), (1, 2)), moved(SoapAndAdamW(BASE, Soap()), net(), (1, 2))
    assert all(torch.equal(plain[name], own[name]) == name.endswith("bias") for name in plain)
    w = nn.Parameter(net().stages[0].weight.detach().view(2, 9))
    torch.manual_seed(1)
    seen = [torch.randn(2, 9, dtype=torch.float64)]
    torch.manual_seed(2)
    seen.append(torch.randn(2, 9, dtype=torch.float64))
    assert torch.allclose(own["stages.0.weight"].view(2, 9), run(soap(w, beta=0.95), w, seen), atol=1e-14, rtol=0)


def test_state_survives() -> None:
    make, of, whole = SoapAndAdamW(BASE, Soap(every=2)), net(), net()
    first, second = make(of), make(of)
    moved(lambda net: first, of, (1, 2, 3))
    second.load_state_dict(first.state_dict())
    resumed, unbroken = moved(lambda net: second, of, (4, 5)), moved(make, whole, (1, 2, 3, 4, 5))
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_refusals() -> None:
    with pytest.raises(PlanError, match="soap turns the moments of adamw, but the optimizer is Sgd"):
        Soap().edit(baseline())
    with pytest.raises(PlanError, match="the network has none"):
        SoapAndAdamW(BASE, Soap())(Net([nn.BatchNorm1d(3)]))
    assert Need.LAYER_GRADS in Soap().edit(with_adamw(baseline())).needs
