"""Modules on workers of their own: bit for bit what one worker makes of the same plan, however far they run apart."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.compose import check, compose
from orchestrator.recipe import expand
from orchestrator.recipe.load import loads
from strategies.contract import ModelSpec, Plan, PlanError
from strategies.decoupled.boundary import build
from strategies.decoupled.roles import Line
from strategies.delayed_gradient import DelayedGradient
from strategies.ema import Ema
from strategies.local_loss import LocalLoss
from strategies.net import Net
from strategies.pipeline import Pipeline
from strategies.synthetic_gradient import SyntheticGradient
from tests.strategies.cases import with_stages
from tests.strategies.harness import WIDTH, Blobs, Trained, baseline, distance, train
from tests.workers import run_workers

CUTS = [1, 2]
Job = tuple[str, dict[str, Any], dict[str, Any]]  # a strategy's kind and options, options of training
KINDS: dict[str, Any] = {
    "dgl": LocalLoss, "dni": SyntheticGradient, "late": DelayedGradient, "pipeline": Pipeline
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As workers have: sums over a batch are rounded otherwise where threads share them out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def three_stages(inputs: tuple[int, ...], classes: int) -> Net:
    """With running statistics, and dtypes that differ: batch norms count batches."""
    sizes = ((WIDTH, 8), (8, 7), (7, 6))
    stages = [nn.Sequential(nn.Linear(size, out), nn.BatchNorm1d(out), nn.Tanh()) for size, out in sizes]
    return Net(stages, head=nn.Linear(6, classes))


def base() -> Plan:
    return baseline(epochs=2).map(lambda phase: dataclasses.replace(phase, model=ModelSpec(three_stages)))


def on_workers(worker: Any, jobs: list[Job], directory: Path) -> list[Trained]:
    """Each job's plan, trained by this worker among others."""
    found = []
    for number, (kind, options, how) in enumerate(jobs):
        plan = KINDS[kind](cuts=CUTS, **options).edit(base())
        found.append(train(plan, directory / str(number), worker=worker, **how))
    return found


def together(options: dict[str, Any]) -> dict[str, Any]:
    """The same, with all modules on each worker."""
    return {k: False if k == "roles" else v for k, v in options.items() if k not in ("ahead", "bf16_messages")}


def on_one(kind: str, options: dict[str, Any], directory: Path, **how: Any) -> Trained:
    return train(KINDS[kind](cuts=CUTS, **together(options)).edit(base()), directory, **how)


def untimed(trained: Trained, late: bool) -> list[dict[str, object]]:
    """Rows, but for times, and for cosines where they come late."""
    timed = ("second", "occupancy", *(["cosine"] if late else []))
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in trained.rows]


def assert_alike(apart: Trained, alone: Trained, late: bool = False) -> None:
    assert distance(apart, alone) == 0
    for a, b in zip(untimed(apart, late), untimed(alone, late), strict=True):
        assert a == pytest.approx(b, rel=1e-12)


JOBS: list[Job] = [
    ("dgl", {"ahead": 0}, {}),
    ("dgl", {"ahead": 2}, {"log_steps": 5}),
    ("dgl", {"ahead": 1, "loss": "predsim"}, {"micro_batch": 5}),
    ("dni", {"roles": True, "queue": 0, "rate": 0.01}, {}),
    ("dni", {"roles": True, "queue": 2, "rate": 0.01}, {"log_steps": 5}),
    ("dni", {"roles": True, "queue": 1, "share": 0.2, "share_epochs": 1.0}, {"micro_batch": 5}),
    ("late", {"ahead": 0, "variant": "ddg"}, {}),
    ("late", {"ahead": 1, "variant": "ddg"}, {"micro_batch": 5, "log_steps": 3, "save_seconds": 0}),
    ("late", {"ahead": 0, "variant": "fr", "shrink": 0.7}, {"micro_batch": 5}),
    ("late", {"ahead": 0, "variant": "fdg", "shrink": 0.7}, {"save_seconds": 0}),
    ("late", {"ahead": 1, "variant": "fdg"}, {"micro_batch": 5, "log_steps": 5, "save_seconds": 0}),
    ("pipeline", {"roles": True, "micro_batches": 3}, {}),
    ("pipeline", {"roles": True, "micro_batches": 2}, {"micro_batch": 5}),
]


ROUNDED: list[Job] = [
    ("dgl", {"ahead": 1, "bf16_messages": True}, {}),
    ("dni", {"roles": True, "queue": 1, "bf16_messages": True}, {}),
    ("late", {"ahead": 1, "bf16_messages": True}, {}),
    ("pipeline", {"roles": True, "micro_batches": 2, "bf16_messages": True}, {}),
]


def assert_as_alone(found: list[Trained], directory: Path) -> None:
    for number, ((kind, options, how), apart) in enumerate(zip(JOBS, found, strict=True)):
        alone = on_one(kind, options, directory / f"alone {number}", **how)
        assert_alike(apart, alone, late=bool(options.get("queue")))


def with_delays(worker: Any, jobs: list[Job], directory: Path) -> list[Trained]:
    """Before each message that is sent or asked for, and before each wait; other ones on each worker, and rarely long ones."""
    delays = random.Random(worker.rank)

    def pause() -> None:
        time.sleep(0.02 if delays.random() < 0.02 else 0.001 * delays.random())

    class Slow:
        def __init__(self, pending: Any):
            self.pending = pending

        def wait(self) -> None:
            pause()
            self.pending.wait()

    def slow(verb: Any) -> Any:
        return lambda t, role: (pause(), Slow(verb(t, role)))[1]

    worker.send, worker.recv = slow(worker.send), slow(worker.recv)
    return on_workers(worker, jobs, directory)


def test_three_roles_equal_one_worker(tmp_path: Path) -> None:
    """Random delays change nothing and hold nobody up, however far modules may run apart."""
    (found, *_) = run_workers(with_delays, 3, JOBS + ROUNDED, tmp_path / "apart")
    assert_as_alone(found[: len(JOBS)], tmp_path)
    for (kind, options, _), apart in zip(ROUNDED, found[len(JOBS) :], strict=True):
        assert 1e-7 < distance(apart, on_one(kind, options, tmp_path / f"exact {kind}")) < 1e-2


@pytest.mark.slow
def test_three_roles_equal_one_worker_as_fast_as_they_can(tmp_path: Path) -> None:
    (found, *_) = run_workers(on_workers, 3, JOBS, tmp_path / "apart")
    assert_as_alone(found, tmp_path)


def test_idle_time_and_occupancy_are_told_of_each_rank(tmp_path: Path) -> None:
    """Of a worker that waits for one that is slow: seconds in a step, and the share of the step that is left."""
    (found, *_) = run_workers(slow_first_module, 2, tmp_path)
    rows = found.rows
    idle, occupied = ([[row[f"train_{what}_{rank}"] for row in rows] for rank in (0, 1)]
                      for what in ("idle_seconds", "occupancy"))  # fmt: skip
    assert max(idle[1]) >= 0.05
    assert min(idle[0]) >= 0 and sum(idle[0]) < sum(idle[1])
    assert all(0 <= share <= 1 for rank in occupied for share in rank)
    assert sum(occupied[1]) < sum(occupied[0])


def slow_first_module(worker: Any, directory: Path) -> Trained:
    if worker.rank == 0:
        send = worker.send
        worker.send = lambda t, role: (time.sleep(0.1), send(t, role))[1]
    plan = LocalLoss(cuts=[1], ahead=1).edit(with_stages(baseline(epochs=1)))
    return train(plan, directory, worker=worker)


class Mail:
    """A worker whose messages arrive when they are waited for; what it sends comes back to it."""

    role = 0

    def __init__(self) -> None:
        self.under_way: list[torch.Tensor] = []

    def send(self, t: torch.Tensor, role: int) -> Any:
        self.under_way.append(t)
        return Letter(lambda: self.under_way.pop(0))

    def recv(self, t: torch.Tensor, role: int) -> Any:
        return Letter(lambda: t.copy_(self.under_way.pop(0)))


class Letter:
    def __init__(self, wait: Any):
        self.wait = wait


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_than_so_many_batches_are_under_way(ahead: int) -> None:
    mail = Mail()
    line = Line(mail, build((WIDTH,), 3, ModelSpec(three_stages), (1,)))  # type: ignore[arg-type]
    line.begin([4, 4], ahead)
    for _ in range(9):
        line.send(torch.zeros(4, 8), 1)
        assert len(mail.under_way) <= 2 * ahead
    assert len(mail.under_way) == 2 * ahead


@pytest.mark.parametrize(("bf16", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_bf16_messages_are_half_as_long(bf16: bool, dtype: torch.dtype) -> None:
    mail = Mail()
    line = Line(mail, build((WIDTH,), 3, ModelSpec(three_stages), (1,)), bf16)  # type: ignore[arg-type]
    line.begin([4], 1)
    sent = torch.randn(4, 8)
    line.send(sent, 1)
    assert [t.dtype for t in mail.under_way] == [dtype]
    got, message = line.expect(sent.shape, 1)
    message.wait()
    assert got.dtype == torch.float32
    assert got.equal(sent.to(dtype).float())


def interrupted(worker: Any, job: Job, directory: Path) -> str:
    try:
        on_workers(worker, [job], directory)
    except InterruptedError:
        return "interrupted"
    return "not interrupted"


@pytest.mark.parametrize("job", [JOBS[2], JOBS[4], JOBS[7], JOBS[9], JOBS[10]], ids=lambda job: " ".join(map(str, job)))
@pytest.mark.slow
def test_roles_resume_from_the_checkpoint_of_rank_0(job: Job, tmp_path: Path) -> None:
    """Momentum, synthesisers and what they wait for included, of modules that rank 0 does not train."""
    kind, options, how = job
    how = how | {"log_steps": 1, "save_seconds": 0}
    broken = (kind, options, how | {"data": Blobs(fail_at=60)})
    assert run_workers(interrupted, 3, broken, tmp_path / "apart") == ["interrupted"] * 3
    assert list((tmp_path / "apart" / "0" / "trial" / "checkpoints").glob("step_*"))
    (resumed, *_) = run_workers(on_workers, 3, [(kind, options, how)], tmp_path / "apart")
    alone = on_one(kind, options, tmp_path / "alone", log_steps=1, micro_batch=how.get("micro_batch", 64))
    assert distance(resumed[0], alone) == 0


def two_by_two(worker: Any, directory: Path) -> list[Trained]:
    found = []
    for number, (kind, options) in enumerate(REPLICATED):
        plan = KINDS[kind](cuts=[1], **options).edit(with_stages(baseline(batch=11)))
        found.append(train(plan, directory / str(number), worker=worker))
    return found


REPLICATED: list[tuple[str, dict[str, Any]]] = [
    ("dgl", {"ahead": 1}),
    ("dni", {"roles": True, "queue": 1, "rate": 0.01}),
    ("late", {"ahead": 1, "variant": "ddg"}),
    ("late", {"ahead": 0, "variant": "fdg"}),
    ("pipeline", {"roles": True, "micro_batches": 2}),
]


@pytest.mark.slow
def test_replicas_of_roles_share_out_the_batch(tmp_path: Path) -> None:
    """Two replicas of two modules, on 5 and 6 examples of each batch."""
    found = run_workers(two_by_two, 4, tmp_path / "apart")
    for number, (kind, options) in enumerate(REPLICATED):
        alone = train(
            KINDS[kind](cuts=[1], **together(options)).edit(with_stages(baseline(batch=11))), tmp_path / str(number)
        )
        assert distance(found[0][number], alone) < 1e-12


def messages(worker: Any) -> list[float]:
    """Of two roles in two replicas: five messages to the other role, received in the order in which they were sent."""
    worker.take_roles(2)
    other, sent = 1 - worker.role, [torch.full((3,), 10.0 * worker.rank + i) for i in range(5)]
    got = [torch.zeros(3) for _ in sent]
    pending = [worker.recv(t, other) for t in got] + [worker.send(t, other) for t in sent]
    for one in pending:
        one.wait()
    total = worker.sum_role_(torch.tensor([float(worker.rank)]))
    return [*(float(t[2]) for t in got), float(total)]


@pytest.mark.slow
def test_messages_stay_in_order_within_a_replica() -> None:
    first, second, third, fourth = run_workers(messages, 4)
    assert first == [10.0, 11.0, 12.0, 13.0, 14.0, 0.0 + 2.0]
    assert second == [0.0, 1.0, 2.0, 3.0, 4.0, 1.0 + 3.0]
    assert third == [30.0, 31.0, 32.0, 33.0, 34.0, 2.0]
    assert fourth == [20.0, 21.0, 22.0, 23.0, 24.0, 4.0]


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("strategy", [
    LocalLoss(cuts=CUTS, ahead=1), SyntheticGradient(cuts=CUTS, roles=True), DelayedGradient(cuts=CUTS, ahead=0),
    Pipeline(cuts=CUTS)
])  # fmt: skip
def test_roles_ask_for_an_engine_that_sends(strategy: Any) -> None:
    plan = strategy.edit(base())
    assert plan.roles == 3
    check(plan, "ddp")
    with pytest.raises(PlanError, match="ROLES"):
        check(plan, "solo")


def test_what_roles_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="state `cuts`"):
        LocalLoss(ahead=1).edit(base())
    with pytest.raises(PlanError, match="leave out `inputs` or `roles`"):
        SyntheticGradient(inputs=True, roles=True)
    with pytest.raises(PlanError, match="looks at all modules"):
        Ema().edit(LocalLoss(cuts=CUTS, ahead=1).edit(base()))
    with pytest.raises(PlanError, match="has 3 roles already"):
        SyntheticGradient(cuts=CUTS, roles=True).edit(LocalLoss(cuts=CUTS, ahead=1).edit(base()))
    with pytest.raises(PlanError, match="bf16_messages are those between workers"):
        DelayedGradient(cuts=CUTS, bf16_messages=True).edit(base())
    with pytest.raises(PlanError, match="take a multiple of 3"):
        train(LocalLoss(cuts=CUTS, ahead=1).edit(base()), tmp_path)


RECIPE = """\
study: roles
workload: {data: digits, model: {mlp: {depth: 4}}, evaluate: {epochs: 1}}
engine: ddp
cluster: {workers: 3}
base: {optimizer: {sgd: {}}, epochs: 1, batch: 32, rate: {peak: 0.1}}
strategies: [{local_loss: {cuts: [2], ahead: 1}}]
"""


def test_a_recipe_states_workers_for_each_role() -> None:
    (trial,) = expand(loads(RECIPE, "recipe.yaml", ()), "data", "fp32")
    with pytest.raises(PlanError, match=r"cluster\.workers is 3: take a multiple of 2"):
        compose(trial, examples=100)
    (trial,) = expand(loads(RECIPE, "recipe.yaml", ("cluster.workers=4",)), "data", "fp32")
    assert compose(trial, examples=100).roles == 2


def test_one_module_has_one_role(tmp_path: Path) -> None:
    plan = LocalLoss(cuts=[], ahead=1).edit(base())
    assert plan.roles == 1
    assert distance(train(plan, tmp_path / "role"), train(base(), tmp_path / "plain")) == 0
