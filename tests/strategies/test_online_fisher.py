"""Oracles of the online Fisher factor: the dense inverse, the trace, stationary data, and its limits; in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strategies.parts.online_fisher import DELTA, EPSILON, Factor, Sums, first, merged, of_rows, onto, rank_of, start

ALPHA = 4.0


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(n: int, width: int, seed: int = 0) -> Tensor:
    """Rows of one distribution, whose variance falls along directions that are not the columns'."""
    turn = torch.linalg.qr(torch.randn(width, width, generator=drawn(1000), dtype=torch.float64)).Q
    x = torch.randn(n, width, generator=drawn(seed), dtype=torch.float64)
    return x * torch.logspace(0, -2, width, dtype=torch.float64) @ turn


def sums(x: Tensor, factor: Factor | None, whole: bool = True) -> Sums:
    square, products = of_rows(x, factor.q if factor else None, whole)
    return Sums(torch.tensor(len(x), dtype=torch.float64), square, products)


def trained(width: int = 12, rank: int = 5, batches: int = 4) -> Factor:
    factor = first(start(width, rank, torch.zeros(0, dtype=torch.float64)), sums(rows(64, width), None), 0.2)
    for seed in range(batches):
        x = rows(64, width, seed + 1)
        factor = factor.updated(sums(x, factor), 0.2)
    return factor


def test_the_first_factor_has_the_published_rows() -> None:
    q = start(7, 3, torch.zeros(0, dtype=torch.float64)).q
    by_hand = torch.tensor([[1.1, 0, 0, 1, 0, 0, 1], [0, 1.1, 0, 0, 1, 0, 0], [0, 0, 1.1, 0, 0, 1, 0]])
    assert torch.allclose(q, by_hand.double() / by_hand.double().norm(dim=1, keepdim=True), atol=1e-7)
    assert [rank_of(*pair) for pair in ((1, 20), (2, 20), (3, 80), (10, 20), (100, 20), (9, 0))] == [0, 1, 2, 5, 20, 0]


def test_the_shortcut_is_the_dense_inverse() -> None:
    factor, x = trained(), rows(20, 12, 9)
    tr = factor.trace()
    smoothed = factor.dense() + ALPHA / 12 * tr * torch.eye(12, dtype=torch.float64)
    beta = factor.rho * (1 + ALPHA) + ALPHA * factor.d.sum() / 12
    assert torch.allclose(factor.reduce(x, ALPHA), beta * x @ torch.linalg.inv(smoothed), rtol=1e-13, atol=1e-13)
    assert torch.allclose(tr, factor.dense().trace(), rtol=1e-13)


@pytest.mark.parametrize("whole", [True, False])
def test_rows_keep_their_norm(whole: bool) -> None:
    factor, x = trained(), rows(20, 12, 9)
    kept = factor.scale(sums(x, factor, whole), ALPHA) * factor.reduce(x, ALPHA)
    assert torch.allclose(kept.norm(), x.norm(), rtol=1e-13)
    assert not torch.allclose(kept, x, rtol=1e-2)
    nothing = torch.zeros(4, 12, dtype=torch.float64)
    assert factor.scale(sums(nothing, factor), ALPHA) == 1 and factor.updated(sums(nothing, factor), 0.2) is factor


def test_an_update_keeps_trace_and_right_angles() -> None:
    factor, x, eta = trained(), rows(64, 12, 9), 0.3
    target = eta * x.T @ x / 64 + (1 - eta) * factor.dense()
    new = factor.updated(sums(x, factor), eta)
    assert min(new.d.min(), new.rho) > DELTA * (new.d.max() + new.rho) * 1.001  # no floor acts
    assert torch.allclose(new.trace(), target.trace(), rtol=1e-13)
    assert torch.allclose(new.q @ new.q.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-13)


def test_an_update_is_a_step_of_the_power_iteration() -> None:
    """Y = Q T with T dense, by hand."""
    factor, x, eta = trained(), rows(64, 12, 9), 0.3
    t = eta * x.T @ x / 64 + (1 - eta) * factor.dense()
    y = factor.q @ t
    c, u = torch.linalg.eigh(y @ y.T)
    q = c.flip(0).rsqrt()[:, None] * (u.flip(1).T @ y)
    rho = (t.trace() - c.sqrt().sum()) / (12 - 5)
    by_hand = (q.T * (c.flip(0).sqrt() - rho)) @ q + rho * torch.eye(12, dtype=torch.float64)
    assert torch.allclose(factor.updated(sums(x, factor), eta).dense(), by_hand, rtol=0, atol=1e-13)


def test_parts_of_a_batch_add_up() -> None:
    factor, x = trained(), rows(64, 12, 9)
    parts = [sums(part, factor) for part in x.split(20)]
    added = Sums(*(sum(getattr(p, name) for p in parts) for name in ("rows", "square", "products")))  # type: ignore[arg-type]
    assert torch.allclose(factor.updated(added, 0.3).dense(), factor.updated(sums(x, factor), 0.3).dense(), atol=1e-14)


@pytest.mark.parametrize("rank", [5, 9, 15])
def test_stationary_data_are_learnt(rank: int) -> None:
    """Against the best of its form: the top components of the true covariance, the rest even."""
    width = 30
    factor = start(width, rank, torch.zeros(0, dtype=torch.float64))
    scales, g = torch.logspace(0, -1, width, dtype=torch.float64), drawn()
    x = torch.randn(512, width, generator=g, dtype=torch.float64) * scales
    factor = first(factor, sums(x, None), 0.1)
    for _ in range(800):
        x = torch.randn(512, width, generator=g, dtype=torch.float64) * scales
        factor = factor.updated(sums(x, factor), 1 - torch.exp(torch.tensor(-512 / 20000)).item())
    truth = scales.square()
    best = torch.cat([truth[:rank], truth[rank:].mean().expand(width - rank)]).diag()
    assert (factor.dense() - best).norm() / truth.norm() < 0.02


def test_much_smoothing_changes_nothing() -> None:
    factor, x = trained(), rows(20, 12, 9)
    kept = factor.scale(sums(x, factor), 1e8) * factor.reduce(x, 1e8)
    assert torch.allclose(kept, x, rtol=0, atol=1e-6 * x.norm().item())
    none = start(12, 0, x)
    assert torch.equal(none.reduce(x, ALPHA), x) and none.scale(sums(x, none), ALPHA) == 1
    assert none.updated(sums(x, none), 0.5) is none


def test_a_single_column_is_left_alone() -> None:
    x = rows(20, 1)
    one = first(start(1, 20, x), sums(x, None), 0.5)
    assert torch.equal(one.scale(sums(x, one), ALPHA) * one.reduce(x, ALPHA), x)


def test_scale_of_the_rows_passes_through() -> None:
    def result(scale: float) -> Tensor:
        factor = start(12, 5, torch.zeros(0, dtype=torch.float64))
        factor = first(factor, sums(scale * rows(64, 12), None), 0.2)
        for seed in range(20):
            factor = factor.updated(sums(scale * rows(64, 12, seed), factor), 0.2)
        x = scale * rows(20, 12, 99)
        return factor.scale(sums(x, factor), ALPHA) * factor.reduce(x, ALPHA)

    assert torch.allclose(result(1000.0), 1000 * result(1.0), rtol=0, atol=1e-6)


def test_with_all_components_and_no_smoothing_it_is_the_natural_gradient() -> None:
    """R = D - 1 and one batch for ever: X S^-1 up to its norm."""
    x = torch.randn(50, 3, generator=drawn(), dtype=torch.float64) * torch.tensor([1.0, 0.5, 0.25])  # above the floors
    factor = first(start(3, 2, x), sums(x, None), 0.9)
    for _ in range(60):
        factor = factor.updated(sums(x, factor), 0.9)
    found, wanted = factor.reduce(x, 1e-12), x @ torch.linalg.inv(x.T @ x)
    assert torch.allclose(found / found.norm(), wanted / wanted.norm(), rtol=0, atol=1e-8)


def test_one_direction_only_keeps_right_angles_and_stays_above_the_floors() -> None:
    """Rows of rank 1 leave all other components of Q next to nothing."""
    x = torch.outer(torch.linspace(-1, 1, 30, dtype=torch.float64), torch.ones(12, dtype=torch.float64))
    factor = first(start(12, 5, x), sums(x, None), 0.9)
    for _ in range(30):
        factor = factor.updated(sums(x, factor), 0.9)
    assert torch.allclose(factor.q @ factor.q.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-13)
    assert min(factor.d.min(), factor.rho) >= max(EPSILON, DELTA * factor.d.max().item()) * 0.99


def test_few_rows_start_with_one_update() -> None:
    few, many = rows(4, 12), rows(64, 12)
    begun = start(12, 5, few)
    for x, updates in ((few, 1), (many, 3)):
        by_hand = begun
        for _ in range(updates):
            by_hand = by_hand.updated(onto(by_hand, sums(x, None)), 0.2)
        assert torch.equal(first(begun, sums(x, None), 0.2).dense(), by_hand.dense())


def test_a_merger_of_equals_is_the_same_and_keeps_the_mean_trace() -> None:
    one, other = trained(), trained(batches=9)
    assert torch.allclose(merged([one, one, one]).dense(), one.dense(), rtol=0, atol=1e-13)
    both = merged([one, other])
    mean = (one.dense() + other.dense()) / 2
    assert torch.allclose(both.trace(), mean.trace(), rtol=1e-13)
    rank, width = both.q.shape
    values = torch.linalg.eigvalsh(mean)
    best = (values[: width - rank] - values[: width - rank].mean()).norm()
    assert (both.dense() - mean).norm() <= best * (1 + 1e-9)
