"""Oracles of NG-SGD: a step written out with dense inverses over rows, convolutions by their gradient, and max-change."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from cluster.engines import make_worker
from strategies.backprop import Backprop
from strategies.contract import Batch, Clock, Plan, PlanError
from strategies.loss_smoothing import LossSmoothing
from strategies.natural_gradient import NaturalGradient
from strategies.net import Net
from strategies.ng_sgd import NgSgd
from strategies.optimizers import Sgd
from strategies.parts.max_change import MaxChange
from strategies.parts.online_fisher import Factor, Sums, start
from strategies.parts.patch_layer import PatchAffine
from strategies.rate import Rate
from tests.strategies.cases import convolved_net, normalised_net
from tests.strategies.harness import CLASSES, IMAGES, WIDTH, Blobs, baseline, distance, tiny_net, train

SOLO = make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))
ALPHA = 4.0


def learner(options: dict[str, Any]) -> Backprop:
    plan = Plan((replace(baseline().phases[0], learner=Backprop(optimizer=Sgd(momentum=0), rate=Rate(1.0))),))
    free = {"layer_change": None, "total_change": None}
    return NgSgd(**free | options).edit(plan).phases[0].learner  # type: ignore[return-value]


def moved(net: Net, options: dict[str, Any], batches: list[Batch]) -> list[dict[str, Tensor]]:
    """The step that each parameter takes at a rate of 1, for each of the batches, in micro-batches of 5."""
    own = learner(options)
    state = own.init(net, SOLO)
    steps = []
    for number, batch in enumerate(batches):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        parts = [Batch(*part) for part in zip(*(t.split(5) for t in (batch.x, batch.y, batch.position)), strict=True)]
        own.step(state, parts, Clock(number, len(batches), 0.0, 0.1, len(batch), 0))
        steps.append({name: before[name] - p.detach() for name, p in net.named_parameters()})
    return steps


def dense(x: Tensor, factor: Factor) -> Tensor:
    """Rows beta X (F + alpha tr(F) / D I)^-1, with the norm of X."""
    f = factor.dense()
    smoothed = f + ALPHA * f.trace() / len(f) * torch.eye(len(f), dtype=f.dtype)
    found = x @ torch.linalg.inv(smoothed)
    return found * x.norm() / found.norm()


def follow(factor: Factor, x: Tensor, eta: float) -> Factor:
    count = torch.tensor(len(x), dtype=torch.float64)
    return factor.updated(Sums(count, x.square().sum(), factor.q @ x.T @ x), eta)


def begun(x: Tensor, rank: int, eta: float) -> Factor:
    factor = start(x.shape[1], rank, x)
    for _ in range(3 if len(x) > len(factor.q) else 1):
        factor = follow(factor, x, eta)
    return factor


def linear_rows(net: Net, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """(inputs with the bias' one, gradients of each example's own loss) of both layers of the tiny net."""
    x = batch.x.flatten(1)
    first, head = net.stages[0][0], net.head  # type: ignore[index]
    before = first(x).detach().requires_grad_()
    hidden = before.tanh()
    logits = head(hidden)
    grads = torch.autograd.grad(cross_entropy(logits, batch.y, reduction="sum"), [before, logits])
    return [(pad(t.detach(), (0, 1), value=1.0), g) for t, g in zip((x, hidden), grads, strict=True)]


@pytest.mark.parametrize("history", [{}, {"history_samples": 30}, {"history_batches": 3}], ids=str)
def test_two_steps_by_hand(history: dict[str, int]) -> None:
    """Y' X / N over preconditioned rows; each batch meets the factors as they were before it."""
    net = tiny_net((WIDTH,), CLASSES).double()
    batches = [Blobs().train(12 * i, 12 * i + 12) for i in range(2)]
    eta = 1 / 3 if "history_batches" in history else 1 - exp(-12 / history.get("history_samples", 2000))
    twin = tiny_net((WIDTH,), CLASSES).double()
    twin.load_state_dict(net.state_dict())
    steps = moved(net, {"rank_in": 3, "rank_out": 2} | history, batches)
    factors: dict[int, tuple[Factor, Factor]] = {}
    for batch, step in zip(batches, steps, strict=True):
        for i, ((x, y), name) in enumerate(zip(linear_rows(twin, batch), ("stages.0.0", "head"), strict=True)):
            inside, outside = factors.get(i) or (begun(x, 3, eta), begun(y, 2, eta))
            wanted = dense(y, outside).T @ dense(x, inside) / 12
            found = torch.cat([step[f"{name}.weight"], step[f"{name}.bias"][:, None]], 1)
            assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
            factors[i] = follow(inside, x, eta), follow(outside, y, eta)
        with torch.no_grad():
            for name, p in twin.named_parameters():
                p.sub_(step[name])


def test_a_convolution_goes_by_the_rows_and_columns_of_its_gradient() -> None:
    torch.manual_seed(0)
    net, batch = convolved_net(IMAGES, CLASSES).double(), Blobs(inputs=IMAGES).train(0, 12)
    conv = net.stages[1][0]  # type: ignore[index]
    weight, bias = torch.autograd.grad(cross_entropy(net(batch.x), batch.y), [conv.weight, conv.bias])
    gradient = torch.cat([weight.permute(0, 2, 3, 1).flatten(1), bias[:, None]], 1)
    columns = begun(12 * gradient, 80, 1 / 4).reduce(gradient, ALPHA).T  # of the norm that they have by now
    wanted = dense(columns, begun(12 * columns, 80, 1 / 4)).T * gradient.norm() / columns.norm()
    (step,) = moved(net, {}, [batch])
    found = torch.cat([step["stages.1.0.weight"].permute(0, 2, 3, 1).flatten(1), step["stages.1.0.bias"][:, None]], 1)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_wide_side_starts_by_one_update_and_acts_from_the_second_batch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.parts.preconditioner.WIDEST", 6)  # below the 7 columns of the first layer's inputs
    net = tiny_net((WIDTH,), CLASSES).double()
    batches = [Blobs().train(12 * i, 12 * i + 12) for i in range(2)]
    options = {"rank_in": 3, "rank_out": 0, "history_batches": 3}
    twin = tiny_net((WIDTH,), CLASSES).double()
    twin.load_state_dict(net.state_dict())
    one, two = moved(net, options, batches)
    (x, y), _ = linear_rows(twin, batches[0])
    assert torch.allclose(one["stages.0.0.weight"], (y.T @ x)[:, :-1] / 12, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.sub_(one[name])
    factor = follow(start(7, 3, x), x, 1 / 3)
    (x, y), _ = linear_rows(twin, batches[1])
    assert torch.allclose(two["stages.0.0.weight"], (y.T @ dense(x, factor))[:, :-1] / 12, rtol=1e-9, atol=1e-12)


def test_what_is_no_affine_layer_keeps_its_gradient() -> None:
    net, batch = normalised_net((WIDTH,), CLASSES).double(), Blobs().train(0, 5)
    norm = net.stages[0][1]  # type: ignore[index]
    wanted = torch.autograd.grad(cross_entropy(net(batch.x), batch.y), norm.weight)[0]
    (step,) = moved(net, {}, [batch])
    assert torch.allclose(step["stages.0.1.weight"], wanted, rtol=0, atol=1e-14)


def test_a_frozen_layer_is_left_out() -> None:
    net = tiny_net((WIDTH,), CLASSES).double()
    net.stages[0][0].weight.requires_grad_(False)  # type: ignore[index]
    (step,) = moved(net, {}, [Blobs().train(0, 12)])
    assert not step["stages.0.0.weight"].any() and step["head.weight"].any()


@pytest.mark.parametrize(
    "options",
    [
        {"rank_in": 1},
        {"rank_out": 1},
        {"alpha": 1.0},
        {"history_samples": 20},
        {"history_batches": 2},
        {"update_period": 1},
        {"layer_change": 0.01},
        {"total_change": 0.01},
    ],
    ids=str,
)
def test_every_option_acts(options: dict[str, Any], tmp_path: Path) -> None:
    usual = train(NgSgd().edit(baseline(epochs=4)), tmp_path / "usual")
    assert distance(train(NgSgd(**options).edit(baseline(epochs=4)), tmp_path / "other"), usual) > 1e-7


@pytest.mark.parametrize(
    ("layer", "options", "wanted"),
    [
        (nn.Linear(63, 200), {}, (20, 80)),
        (nn.Conv2d(7, 200, 3), {}, (32, 80)),
        (nn.Conv2d(64, 200, 3), {}, (80, 80)),
        (nn.Conv2d(64, 200, 3), {"rank_in": 0}, (0, 80)),
        (nn.Conv2d(64, 200, 3), {"rank_in": 90}, (90, 80)),
        (PatchAffine(64, 200, 3), {}, (20, 80)),
    ],
    ids=str,
)
def test_ranks(layer: nn.Module, options: dict[str, Any], wanted: tuple[int, int]) -> None:
    """Kaldi's: 20 components of inputs and 80 of output gradients; 80 of the rows and columns of a convolution's gradient."""
    own = learner(options)
    factors = next(u.saved["factors"] for u in own.init(Net([layer]), SOLO).saved["updates"] if "factors" in u.saved)
    assert tuple(len(factors[f"stages.0.{end}"]["q"]) for end in ("in", "out")) == wanted


def test_factors_are_updated_at_ten_steps_and_then_in_periods() -> None:
    net, own = tiny_net((WIDTH,), CLASSES).double(), learner({"update_period": 4})
    state = own.init(net, SOLO)
    index = [type(update).__name__ for update in own.updates].index("Precondition")
    updated = []
    for step in range(20):
        factors = state.saved["updates"][index].saved["factors"]
        before = factors["head.in"]["q"].clone()
        own.step(state, [Blobs().train(12 * step, 12 * step + 12)], Clock(step, 20, 0.0, 0.1, 12, 0))
        updated.append(not torch.equal(before, factors["head.in"]["q"]))
    assert [step for step, was in enumerate(updated) if was] == [*range(10), 13, 17]


def test_a_factor_that_is_made_anew_begins_like_any_other() -> None:
    """As that of inputs is, where kernels grow: by three updates on its first batch, the others going on."""
    net = tiny_net((WIDTH,), CLASSES).double()
    own = learner({"rank_in": 3, "rank_out": 0, "history_batches": 3})
    state = own.init(net, SOLO)
    index = [type(update).__name__ for update in own.updates].index("Precondition")
    factors = state.saved["updates"][index].saved["factors"]
    fresh = dict(factors["stages.0.0.in"])
    for step in range(3):
        if step == 2:
            factors["stages.0.0.in"] = fresh
            twin = tiny_net((WIDTH,), CLASSES).double()
            twin.load_state_dict(net.state_dict())
        batch = Blobs().train(12 * step, 12 * step + 12)
        own.step(state, [batch], Clock(step, 3, 0.0, 0.1, 12, 0))
    (x, y), _ = linear_rows(twin, batch)
    step_taken = twin.stages[0][0].weight - net.stages[0][0].weight  # type: ignore[index]
    assert torch.allclose(step_taken, (y.T @ dense(x, begun(x, 3, 1 / 3)))[:, :-1] / 12, rtol=1e-9, atol=1e-12)
    assert [factors[side]["batches"] for side in ("stages.0.0.in", "head.in")] == [1, 3]


def test_max_change_bounds_each_layer_then_all_and_else_changes_nothing() -> None:
    net = tiny_net((WIDTH,), CLASSES).double()
    for update, wanted in (
        (MaxChange(1.0, None), {"stages.0.0": 1.0, "head": 0.5}),
        (MaxChange(1.0, 0.25), {"stages.0.0": 0.25 / 1.25**0.5, "head": 0.125 / 1.25**0.5}),
        (MaxChange(None, None), {"stages.0.0": 5.0, "head": 0.5}),
    ):
        state = update.init(net, SOLO)
        old = {name: p.detach().clone() for name, p in net.named_parameters()}
        update.before(state, Clock(0, 1, 0.0, 1.0, 1, 0))
        for name, length in (("stages.0.0", 5.0), ("head", 0.5)):
            layer = net.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            direction = [torch.randn_like(p) for p in layer.parameters()]
            norm = torch.stack([d.norm() for d in direction]).norm()
            with torch.no_grad():
                for p, d in zip(layer.parameters(), direction, strict=True):
                    p.add_(d * (length / norm))
        put = {name: p.detach().clone() for name, p in net.named_parameters()}
        update.after(state, Clock(0, 1, 0.0, 1.0, 1, 0))
        for name, length in wanted.items():
            steps = [p.detach() - old[n] for n, p in net.named_parameters() if n.startswith(name)]
            assert torch.stack([s.norm() for s in steps]).norm().item() == pytest.approx(length, abs=1e-12)
        if update == MaxChange(None, None):
            assert all(torch.equal(p, put[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("smoothed_first", [False, True])
def test_several_passes_over_a_batch_count_once(smoothed_first: bool, tmp_path: Path) -> None:
    """Passes of weight noise of next to nothing leave the factors' memory as it is."""
    natural, noise = NgSgd(history_samples=50), LossSmoothing(alpha=0, sigma=1e-13, draws=2, antithetic=True)
    methods = [noise, natural] if smoothed_first else [natural, noise]
    often = reduce(lambda plan, method: method.edit(plan), methods, baseline())
    once = train(natural.edit(baseline()), tmp_path / "once", micro_batch=5)
    assert distance(train(often, tmp_path / "often", micro_batch=5), once) < 1e-9
    assert (
        distance(train(NgSgd(history_samples=12).edit(baseline()), tmp_path / "forgetful", micro_batch=5), once) > 1e-6
    )


def test_two_preconditioners_are_refused() -> None:
    for one, other in ((NgSgd(), NgSgd()), (NgSgd(), NaturalGradient()), (NaturalGradient(), NgSgd())):
        with pytest.raises(PlanError, match="leave one"):
            other.edit(one.edit(baseline()))
