"""Engine ddp's options: buckets change nothing, compression keeps its error bounds, and a restart loses nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from cluster.engines import make_worker
from cluster.engines.compression import PowerSgd
from orchestrator import checkpoint
from strategies.contract import PlanError, Worker
from tests.cluster.test_engines import assert_same, solo, sometimes_used, train
from tests.orchestrator.test_recipe_expand import recipe, trials
from tests.strategies import harness
from tests.workers import run_workers

EXACT = 1e-12
ROUNDING = 2.0**-8  # of bf16, relative
BF16: dict[str, Any] = {"bf16": {}}
BATCH, INPUTS, HIDDEN, OUTPUTS = 12, 24, 20, 16


def powersgd(**options: Any) -> dict[str, Any]:
    """As the driver dumps it from a recipe."""
    return {"none": None, "bf16": None, "powersgd": {"rank": 2, "start": 2, "error_feedback": True} | options}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    make: dict[str, Any] = {"generator": torch.Generator().manual_seed(step), "dtype": torch.float64}
    x = torch.randn(BATCH, INPUTS, **make)
    return x, torch.tanh(x @ network(99)[0].weight.T[:, :OUTPUTS]).detach()


class Run:
    """SGD with momentum on one worker's share of each batch; keeps the averaged gradients of the last step and the losses."""

    def __init__(self, worker: Any, open_model: bool = False, micros: int = 1):
        self.worker, self.micros, self.net = worker, micros, network()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.5)
        self.model = worker.prepare(self.net, self.optimizer, open_model)
        self.grads: list[torch.Tensor] = []
        self.losses: list[float] = []

    def steps(self, first: int, last: int) -> Run:
        for step in range(first, last):
            self.step(*(t.chunk(self.worker.size)[self.worker.rank].chunk(self.micros) for t in batch(step)))
        return self

    def step(self, x: Any, y: Any) -> None:
        losses = []
        for i in range(self.micros):
            with self.worker.micro(self.model, i == self.micros - 1):
                losses.append(mse_loss(self.model(x[i]), y[i]))
                self.worker.backward(losses[-1] * len(x[i]) * self.worker.size / BATCH)
        self.worker.apply(self.model, self.optimizer, self._keep, lambda: None)
        self.losses.append(sum(losses).item() / self.micros)  # type: ignore[union-attr]

    def _keep(self) -> None:
        self.grads = [p.grad.clone() for p in self.net.parameters() if p.grad is not None]


def weights(worker: Worker, steps: int, *args: Any) -> dict[str, torch.Tensor]:
    return dict(Run(worker, *args).steps(0, steps).net.state_dict())


def alone(steps: int) -> dict[str, torch.Tensor]:
    return weights(make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu")), steps)


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = EXACT) -> None:
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize("bucket_mib", ["auto", 1e-5, 25])
def test_bucket_size_changes_nothing(bucket_mib: Any) -> None:
    for result in run_workers(weights, 2, 4, bucket_mib=bucket_mib):
        assert_close(alone(4), result)


def buckets(worker: Worker) -> int:
    run = Run(worker).steps(0, 3)
    assert isinstance(run.model, DistributedDataParallel)
    return len(run.model._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))  # type: ignore[attr-defined]


def test_bucket_size_reaches_ddp() -> None:
    assert run_workers(buckets, 2, bucket_mib=1e-5) == [4, 4]
    assert run_workers(buckets, 2, bucket_mib=25) == [1, 1]


# ------------------------------------------------------------------------------------------------------------- bf16


def first_gradients(worker: Worker, open_model: bool, micros: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The averaged gradients of the first step, and this worker's own share of them, unrounded."""
    run = Run(worker, open_model, micros).steps(0, 1)
    own = network()
    x, y = (t.chunk(worker.size)[worker.rank] for t in batch(0))
    (mse_loss(own(x), y) * len(x) / BATCH).backward()
    return run.grads, [p.grad for p in own.parameters() if p.grad is not None]


@pytest.mark.parametrize("open_model", [False, True])
@pytest.mark.parametrize("size, micros", [(2, 1), (2, 3), (3, 1)])
def test_bf16_stays_within_its_rounding(size: int, micros: int, open_model: bool) -> None:
    """2^-8 of each worker's share when it is rounded, and 2^-8 of the partial sum for each addition: `size` roundings."""
    results = run_workers(first_gradients, size, open_model, micros, compression=BF16)
    for grads, *shares in zip(results[0][0], *(own for _, own in results), strict=True):
        error, magnitude = (grads - sum(shares)).abs(), sum(share.abs() for share in shares)
        assert (error <= size * ROUNDING * (1 + ROUNDING) ** size * magnitude).all()
        assert error.max() > 0  # it was compressed
    for grads, _ in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][0], strict=True))


def round_once(worker: Worker, open_model: bool) -> list[torch.Tensor]:
    """All workers hold the same examples, so that the sum of their shares is exact and the rounding is the only error."""
    run = Run(worker, open_model)
    x, y = batch(0)
    run.model(x).sub(y).square().mean().backward()
    worker.apply(run.model, run.optimizer, run._keep, lambda: None)
    return run.grads


@pytest.mark.parametrize("open_model", [False, True])
def test_bf16_rounds_an_element_by_two_to_the_minus_eight_at_most(open_model: bool) -> None:
    own = network()
    x, y = batch(0)
    own(x).sub(y).square().mean().backward()
    for grads in run_workers(round_once, 2, open_model, compression=BF16):
        for p, grad in zip(own.parameters(), grads, strict=True):
            assert p.grad is not None and ((grad - p.grad).abs() <= ROUNDING * p.grad.abs()).all()


def losses(worker: Worker, steps: int) -> list[float]:
    return Run(worker).steps(0, steps).losses


@pytest.mark.parametrize("compression", [BF16, powersgd(rank=1)], ids=["bf16", "powersgd"])
def test_the_loss_still_falls(compression: Any) -> None:
    told = run_workers(losses, 2, 60, compression=compression)[0]
    assert sum(told[-5:]) < 0.5 * sum(told[:5])


# --------------------------------------------------------------------------------------------------------- powersgd


def full_rank(worker: Any, open_model: bool) -> dict[str, torch.Tensor]:
    """Compressed although that saves nothing, so that the product of thin matrices can hold all of a gradient."""
    run = Run(worker, open_model)
    worker.memory.hook_state.min_compression_rate = 0
    return dict(run.steps(0, 6).net.state_dict())


@pytest.mark.parametrize("rank, open_model", [(HIDDEN, False), (64, True)])
def test_powersgd_of_full_rank_is_the_dense_average(rank: int, open_model: bool) -> None:
    for result in run_workers(full_rank, 2, open_model, compression=powersgd(rank=rank)):
        assert_close(alone(6), result, atol=1e-10)


def test_powersgd_is_dense_until_it_starts_and_differs_after() -> None:
    for result in run_workers(weights, 2, 3, compression=powersgd(start=3)):
        assert_close(alone(3), result)
    for result in run_workers(weights, 2, 4, compression=powersgd(start=3)):
        assert (result["0.weight"] - alone(4)["0.weight"]).abs().max() > 1e-6


def test_powersgd_sees_the_mean_only() -> None:
    """Linear in the workers' gradients: neither their number nor accumulation changes what is learnt."""
    two = run_workers(weights, 2, 8, compression=powersgd())[0]
    for result in run_workers(weights, 3, 8, compression=powersgd()):
        assert_close(two, result)
    for result in run_workers(weights, 2, 8, False, 3, compression=powersgd()):
        assert_close(two, result)


def resumed(worker: Any, error_feedback: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights of an unbroken run, and of one that starts again from rank 0's checkpoint, as the trainer takes it."""
    run = Run(worker).steps(0, 5)
    worker.settle()
    saved = [checkpoint.snapshot([run.net, run.optimizer, worker.memory])]
    dist.broadcast_object_list(saved)
    unbroken = {name: w.clone() for name, w in run.steps(5, 9).net.state_dict().items()}
    again = Run(worker)
    checkpoint.restore([again.net, again.optimizer, worker.memory], saved[0])
    return unbroken, dict(again.steps(5, 9).net.state_dict())


@pytest.mark.parametrize("error_feedback", [True, False])
def test_powersgd_goes_on_bit_for_bit_from_rank_0(error_feedback: bool) -> None:
    for one, other in run_workers(resumed, 2, error_feedback, compression=powersgd(error_feedback=error_feedback)):
        assert_close(one, other, atol=0)


def through_the_trainer(worker: Any, folder: Path) -> tuple[float, int]:
    """How far an interrupted trial ends from an unbroken one, by the real trainer; and the columns sent of its two layers."""
    options: dict[str, Any] = {"worker": worker, "save_seconds": 0}
    unbroken = harness.train(harness.baseline(), folder / "unbroken", **options)
    with pytest.raises(InterruptedError):
        harness.train(harness.baseline(), folder / "broken", harness.Blobs(fail_at=5 * 12), **options)
    dist.barrier()  # rank 0 has written what it had
    resumed = harness.train(harness.baseline(), folder / "broken", **options)
    apart = 0.0 if worker.rank else harness.distance(unbroken, resumed)
    return apart, worker.memory.hook_state.q_memory_dict[0].numel()


def test_an_interrupted_trial_goes_on_bit_for_bit_under_powersgd(tmp_path: Path) -> None:
    """Dense for two steps, compressed for three, interrupted, compressed for seven."""
    assert run_workers(through_the_trainer, 2, tmp_path, compression=powersgd(rank=1)) == [(0.0, 6 + 8)] * 2


def unsettled(worker: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights of a run whose errors were made alike on the way, and of one whose errors were left alone."""
    run = Run(worker).steps(0, 5)
    worker.settle()
    settled = {name: w.clone() for name, w in run.steps(5, 9).net.state_dict().items()}
    return settled, weights(worker, 9)


def test_settling_changes_no_later_average() -> None:
    for settled, left_alone in run_workers(unsettled, 2, compression=powersgd()):
        assert_close(settled, left_alone)


def silent(worker: Any) -> list[torch.Tensor]:
    run = Run(worker)
    for _ in range(4):
        for p in run.net.parameters():
            p.grad = torch.zeros_like(p)
        worker.apply(run.model, run.optimizer, run._keep, lambda: None)
    return run.grads


def test_powersgd_of_gradients_that_vanish_is_zero() -> None:
    for grads in run_workers(silent, 2, compression=powersgd()):
        assert all((grad == 0).all() for grad in grads)


# --------------------------------------------------------------------------------------- synchronisations, refusals


def collectives(worker: Any, micros: int, steps: int) -> int:
    """Calls of all_reduce from Python, by which all compressed averages go."""
    calls, real = [], dist.all_reduce

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    dist.all_reduce = counted  # type: ignore[assignment]
    try:
        Run(worker, False, micros).steps(0, steps)
    finally:
        dist.all_reduce = real
    return len(calls)


@pytest.mark.parametrize("compression", [BF16, powersgd()], ids=["bf16", "powersgd"])
def test_accumulation_synchronises_once_per_step(compression: Any) -> None:
    once = run_workers(collectives, 2, 1, 4, compression=compression)
    assert once[0] > 0 and run_workers(collectives, 2, 3, 4, compression=compression) == once


def test_bf16_averages_a_gradient_that_one_rank_has() -> None:
    results = run_workers(train, 2, False, 1, True, 1, compression=BF16, find_unused_parameters=True)
    assert_same(results[0], results[1])
    assert results[0]["grads"]["dead.weight"].abs().sum() > 0


def test_bf16_leaves_a_gradient_that_no_rank_has_missing() -> None:
    for result in run_workers(train, 2, True, 1, True, compression=BF16):
        assert result["grads"]["dead.weight"] is None and solo(branch=True)["grads"]["dead.weight"] is None


@pytest.mark.parametrize("case", [(train, False, 1, True), (train, False, 2, True), (sometimes_used,)])
def test_unused_parameters_are_named_under_bf16(case: Any) -> None:
    function, *args = case
    with pytest.raises(AssertionError, match=r"no gradient reached dead\.weight, dead\.bias: .*unused_parameters"):
        run_workers(function, 2, *args, compression=BF16)


@pytest.mark.parametrize("open_model", [False, True])
def test_unused_parameters_are_named_under_powersgd(open_model: bool) -> None:
    with pytest.raises(AssertionError, match=r"PlanError: no gradient reached dead\.weight, dead\.bias: leave unused"):
        run_workers(train, 2, open_model, 1, True, compression=powersgd())


@pytest.mark.parametrize("compression", [BF16, powersgd()])
def test_one_worker_has_nothing_to_compress(compression: Any) -> None:
    with pytest.raises(PlanError, match="needs 2 workers or more, got 1: leave it out"):
        make_worker("ddp", {"compression": compression}, "fp32", 0, 1, torch.device("cpu"))


def test_powersgd_refuses_to_look_for_unused_parameters() -> None:
    options = {"compression": powersgd(), "find_unused_parameters": True}
    with pytest.raises(PlanError, match="leave one of the two out"):
        make_worker("ddp", options, "fp32", 0, 2, torch.device("cpu"))


def test_memory_is_saved_as_a_copy_on_its_own_device() -> None:
    memory = PowerSgd(network(), torch.device("cpu"), rank=2, start=2, error_feedback=True)
    saved = {"step": 12, "error": {0: torch.ones(3)}, "p": {0: torch.ones(2)}, "q": {0: torch.ones(1)}}
    memory.load_state_dict(saved)
    memory.hook_state.q_memory_dict[0].zero_()
    assert saved["q"][0] == 1 and memory.state_dict()["step"] == 12  # type: ignore[index]


# ------------------------------------------------------------------------------------------------ recipe and identity


def identity(*overrides: str) -> dict[str, Any]:
    return trials(*overrides, "cluster.workers=2")[0].identity()


def test_compression_is_part_of_a_trials_name_and_nothing_else_of_the_engine_is() -> None:
    plain = identity("engine=ddp")
    assert "compression" not in plain and plain == trials("engine=solo")[0].identity()
    assert plain == identity("engine.ddp.bucket_mib=1") == identity("engine.ddp.compression=none")
    assert identity("engine.ddp.compression=bf16") == plain | {"compression": {"by": "bf16", "workers": 2}}
    compressed = identity("engine.ddp.compression.powersgd.rank=4")["compression"]
    assert compressed == {"by": "powersgd", "rank": 4, "start": 10, "error_feedback": True, "workers": 2}


def test_the_worker_takes_what_the_driver_dumps() -> None:
    engine = recipe("engine.ddp.compression=powersgd", "engine.ddp.bucket_mib=2.5").engine
    worker: Any = make_worker(engine.name, engine.options.model_dump(), "fp32", 0, 2, torch.device("cpu"))
    assert (worker.compression, worker.bucket_mib) == ("powersgd", 2.5)
    worker.prepare(network(), torch.optim.SGD(network().parameters()), False)
    assert worker.memory.hook_state.matrix_approximation_rank == 2
