"""Engines: two workers make the same step as one, by DDP and by the open model's own all-reduce."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from cluster.engines import OFFERS, make_worker
from strategies.contract import Need, PlanError, Worker
from tests.workers import run_workers

BATCH, STEPS = 12, 3
EXACT = 1e-12


class Branches(nn.Module):
    """Two layers, and one that only some ranks or nobody uses."""

    def __init__(self, branch: bool = False):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 2)
        if branch:
            self.dead = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, side: bool = False) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden) + (self.dead(hidden) if side else 0)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    make: dict[str, Any] = {"generator": noise, "dtype": torch.float64}
    return torch.randn(BATCH, 5, **make), torch.randn(BATCH, 2, **make)


def build(branch: bool = False) -> Branches:
    torch.manual_seed(0)
    return Branches(branch).double()


def train(worker: Any, open_model: bool, micros: int = 1, branch: bool = False, side_rank: int = -1) -> dict[str, Any]:
    """A few steps of momentum SGD on this worker's share of each batch; -> weights, and the gradients of the last step."""
    net = build(branch)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    model = worker.prepare(net, optimizer, open_model)
    grads: dict[str, Any] = {}
    options = {"side": True} if worker.rank == side_rank else {}

    def keep() -> None:
        grads.update({n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()})

    x, y = (t.chunk(worker.size)[worker.rank].chunk(micros) for t in data())
    for _ in range(STEPS):
        for i in range(micros):
            with worker.micro(model, last=i == micros - 1):
                weight = len(x[i]) * worker.size / BATCH
                worker.backward(mse_loss(model(x[i], **options), y[i]) * weight)
        worker.apply(model, optimizer, keep, lambda: None)
    assert all(p.grad is None for p in net.parameters())
    return {"wrapped": isinstance(model, DistributedDataParallel), "grads": grads, "weights": net.state_dict()}


def solo(**options: Any) -> dict[str, Any]:
    worker = make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))
    return train(worker, False, **options)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("grads", "weights"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            if value is None:
                assert other[part][name] is None, name
            else:
                torch.testing.assert_close(other[part][name], value, rtol=0, atol=EXACT)


@pytest.mark.parametrize("open_model", [False, True])
@pytest.mark.parametrize("micros", [1, 3])
def test_two_workers_step_as_one(open_model: bool, micros: int) -> None:
    for result in run_workers(train, 2, open_model, micros):
        assert result["wrapped"] is not open_model
        assert_same(solo(), result)


def test_three_workers_step_as_one() -> None:
    for result in run_workers(train, 3, True):
        assert_same(solo(), result)


def test_open_model_leaves_a_gradient_that_no_rank_has_missing() -> None:
    for result in run_workers(train, 2, True, 1, True):
        assert result["grads"]["dead.weight"] is None
        assert_same(solo(branch=True), result)


@pytest.mark.parametrize("open_model", [False, True])
def test_gradient_on_one_rank_only_is_averaged_with_zero(open_model: bool) -> None:
    results = run_workers(train, 2, open_model, 1, True, 1, find_unused_parameters=True)
    assert_same(results[0], results[1])
    assert results[0]["grads"]["dead.weight"].abs().sum() > 0


@pytest.mark.parametrize("micros", [1, 2])
def test_unused_parameters_are_named_with_the_way_out(micros: int) -> None:
    with pytest.raises(AssertionError) as caught:
        run_workers(train, 2, False, micros, True)
    line = str(caught.value).strip().splitlines()[-1]
    assert "PlanError: no gradient reached dead.weight, dead.bias:" in line
    assert "engine: {ddp: {find_unused_parameters: true}}" in line


def sometimes_used(worker: Worker) -> None:
    """The side branch takes part in the first micro-batch only, so that DDP alone notices."""
    net = build(branch=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model = worker.prepare(net, optimizer, False)  # type: ignore[arg-type]
    x, _ = data()
    for _ in range(2):
        for last in (False, True):
            with worker.micro(model, last):
                worker.backward(model(x, side=not last).sum())
        worker.apply(model, optimizer, lambda: None, lambda: None)


def test_parameters_unused_in_the_last_micro_batch_are_named() -> None:
    with pytest.raises(AssertionError, match=r"PlanError: no gradient reached dead\.weight, dead\.bias:"):
        run_workers(sometimes_used, 2)


def test_parameters_unused_pass_where_the_recipe_allows_them() -> None:
    for result in run_workers(train, 2, False, 1, True, find_unused_parameters=True):
        assert_same(solo(branch=True), result)


def sums(worker: Worker) -> list[torch.Tensor]:
    full = torch.full((2, 3), float(worker.rank + 1), dtype=torch.float64)
    across = full.clone().t()
    return [worker.sum_(full), worker.sum_(across), worker.sum_(torch.tensor(worker.rank))]


def test_sum_is_in_place_and_alike_on_every_rank() -> None:
    for full, across, whole in run_workers(sums, 3):
        assert (full == 6).all() and (across == 6).all() and whole == 3


def bare(worker: Worker) -> bool:
    net = nn.Identity()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    return worker.prepare(net, optimizer, False) is net  # type: ignore[arg-type]


def test_net_without_parameters_stays_unwrapped() -> None:
    assert run_workers(bare, 2) == [True, True]


def test_ddp_alone_needs_no_process_group() -> None:
    worker = make_worker("ddp", {"find_unused_parameters": False}, "fp64", 0, 1, torch.device("cpu"))
    assert_same(solo(), train(worker, False))


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_follows_the_precision(precision: str, dtype: torch.dtype) -> None:
    worker = make_worker("solo", {}, precision, 0, 1, torch.device("cpu"))
    with worker.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert precision == "bf16" or isinstance(worker.autocast(), nullcontext)


def test_apply_keeps_its_order() -> None:
    worker = make_worker("solo", {}, "fp32", 0, 1, torch.device("cpu"))
    weight = nn.Parameter(torch.tensor(1.0))
    worker.backward(weight * 2)
    seen: list[tuple[float, float]] = []

    def look() -> None:
        assert weight.grad is not None
        seen.append((weight.item(), weight.grad.item()))

    worker.apply(nn.Identity(), torch.optim.SGD([weight], lr=0.25), look, look)
    assert seen == [(1.0, 2.0), (0.5, 2.0)] and weight.grad is None


def test_offers_and_refusals() -> None:
    assert Need.OPEN_MODEL in OFFERS["solo"] & OFFERS["ddp"]
    assert [name for name, offer in OFFERS.items() if Need.ROLES in offer] == ["ddp"]
    with pytest.raises(PlanError, match="the gang has 2"):
        make_worker("solo", {}, "fp32", 0, 2, torch.device("cpu"))
    with pytest.raises(PlanError, match="'dpp' is unknown: expected one of solo, ddp"):
        make_worker("dpp", {}, "fp32", 0, 1, torch.device("cpu"))
    worker = make_worker("solo", {}, "fp32", 0, 1, torch.device("cpu"))
    with pytest.raises(PlanError, match="no roles"):
        worker.send(torch.zeros(1), 1)
