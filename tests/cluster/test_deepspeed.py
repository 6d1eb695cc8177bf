"""DeepSpeed on two gloo workers: each strategy at each stage equals DDP or is refused; checkpoints that any engine reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engines import OFFERS, make_worker, variant
from orchestrator.compose import check
from strategies import CATALOGUE
from strategies.backprop import CrossEntropy, amend
from strategies.contract import Batch, Clock, Phase, Plan, PlanError, Predict
from tests import workers
from tests.cluster.engine_table import BEGIN, END, table
from tests.strategies import harness
from tests.strategies.cases import CASES, with_adamw, with_batch_norm
from tests.strategies.harness import Blobs, Trained, baseline, distance
from tests.workers import run_workers

pytestmark = pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")

STAGES = (0, 1, 2, 3)
SAVED = (2, 3, "ddp")  # what wrote a checkpoint: ZeRO 2, ZeRO 3, DDP
FEW = (
    "batch_growth",
    "ema",
    "ghost_batch_norm",
    "gradient_clipping",
    "lars",
    "mixup",
)  # the others are in the slow suite
EXACT, CLOSE = 1e-6, 1e-5
BROKEN_AT = 7  # the step in which the planted fault strikes
LIMIT = 240.0
SPREAD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # stage 3 keeps no small weights whole


def at(stage: int, **options: Any) -> tuple[str, dict[str, Any]]:
    return "deepspeed", {"stage": stage, **({"extra": SPREAD_ALL} if stage == 3 else {}), **options}


DDP: tuple[str, dict[str, Any]] = ("ddp", {})


def edited(name: str) -> Plan:
    return CATALOGUE[name](**CASES[name].acts).edit(CASES[name].base(baseline()))


def offered(name: str, stage: int) -> bool:
    return edited(name).needs in OFFERS[variant(*at(stage))]


@dataclass(frozen=True)
class Runs:
    """Trains in a folder of its own each time, on the worker's ranks."""

    rank: int
    size: int
    folder: Path

    def __call__(
        self,
        name: str,
        engine: tuple[str, dict[str, Any]],
        plan: Plan,
        data: Blobs | None = None,
        precision: str = "fp32",
        **options: Any,
    ) -> Trained:
        worker = make_worker(*engine, precision, self.rank, self.size, torch.device("cpu"))
        return harness.train(plan, self.folder / name, data or Blobs(dtype=torch.float32), worker, **options)

    def broken(self, name: str, engine: tuple[str, dict[str, Any]], plan: Plan) -> None:
        """A run that fails in mid-way and leaves its last checkpoint."""
        data = Blobs(dtype=torch.float32, fail_at=BROKEN_AT * 12)
        with pytest.raises(InterruptedError):
            self(name, engine, plan, data, save_seconds=0)


@dataclass(frozen=True)
class Spoil:
    """A loss that stays finite, with a gradient that does not."""

    def __call__(self, predict: Predict, batch: Batch, clock: Clock) -> torch.Tensor:
        logits = predict(batch.x)
        nothing = (logits.sum() * 0).abs().sqrt() if clock.step == 3 else logits.sum() * 0
        return CrossEntropy()(lambda x: logits, batch, clock) + nothing


def spoiled(plan: Plan) -> Plan:
    def change(phase: Phase) -> Phase:
        return amend(phase, plan, objective=lambda old: Spoil())

    return plan.map(change)


def pairs(run: Runs, names: Sequence[str]) -> dict[tuple[str, int], tuple[Trained, Trained]]:
    """(DDP's, DeepSpeed's) of every strategy and stage that go together."""
    found = {}
    for name in names:
        case = CASES[name]
        plan, data = edited(name), Blobs(dtype=torch.float32, inputs=case.inputs)
        stages = [stage for stage in STAGES if offered(name, stage)]
        ddp = run(f"{name} ddp", DDP, plan, data, micro_batch=case.micro) if stages else None
        for stage in stages:
            own = run(f"{name} {stage}", at(stage), plan, data, micro_batch=case.micro)
            found[name, stage] = (ddp, own)
    return found  # type: ignore[return-value]


def stages(run: Runs) -> dict[str, Any]:
    """What is asked of each stage: accumulation, AdamW, batch norm, bf16, a resume, a gradient that is not finite."""
    found: dict[str, Any] = {}
    plans = {"sgd": baseline(), "adamw": with_adamw(baseline()), "norm": with_batch_norm(baseline())}
    for kind, plan in plans.items():
        found[kind] = run(kind, DDP, plan)
        for stage in STAGES:
            found[kind, stage] = run(f"{kind} {stage}", at(stage), plan)
    found["bf16"] = run("bf16", DDP, plans["sgd"], precision="bf16")
    for stage in STAGES:
        found["parts", stage] = run(f"parts {stage}", at(stage), plans["sgd"], micro_batch=4)
        found["bf16", stage] = run(f"bf16 {stage}", at(stage), plans["sgd"], precision="bf16")
        found["bad", stage] = run(f"bad {stage}", at(stage), spoiled(plans["sgd"])).progress.status
        run.broken(f"resumed {stage}", at(stage), plans["adamw"])
        found["resumed", stage] = run(f"resumed {stage}", at(stage), plans["adamw"])
    for source in SAVED:
        run.broken(f"saved {source}", DDP if source == "ddp" else at(int(source)), plans["adamw"])
    found |= moved(run, "two")
    return found


def moved(run: Runs, to: str) -> dict[str, Any]:
    """Runs that were broken at two workers, gone on with by DDP and by ZeRO 2 at other numbers of workers."""
    found: dict[str, Any] = {}
    for source in SAVED:
        for name, engine in (("ddp", DDP), ("zero", at(2)), ("spread", at(3))):
            target = f"{source} {to} {name}"
            if run.rank == 0:
                shutil.copytree(run.folder / f"saved {source}", run.folder / target)
            torch.distributed.barrier() if run.size > 1 else None
            found[target] = run(target, engine, with_adamw(baseline()))
    return found


def everything(worker: Any, folder: Path) -> dict[str, Any]:
    lock = folder / "extensions" / "deepspeed_shm_comm" / "lock"  # what a killed build leaves, on which others hang
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    run = Runs(worker.rank, worker.size, folder)
    found: dict[str, Any] = {"pairs": pairs(run, FEW), "stages": stages(run)}
    found["extensions"] = [path.name for path in (folder / "extensions").rglob("*")]
    return found | {"buckets": [bucket(run, mib) for mib in ("auto", 1e-4)], "limits": limits()}


def others(worker: Any, folder: Path) -> dict[tuple[str, int], tuple[Trained, Trained]]:
    return pairs(Runs(worker.rank, worker.size, folder), sorted(CASES.keys() - FEW))


def bucket(run: Runs, mib: Any) -> int:
    worker: Any = make_worker(*at(1, bucket_mib=mib), "fp32", run.rank, run.size, torch.device("cpu"))
    harness.train(baseline(epochs=1), run.folder / f"bucket {mib}", Blobs(dtype=torch.float32), worker)
    return int(worker.engine.optimizer.reduce_bucket_size)


def limits() -> list[float]:
    """Seconds that each process group of this rank waits for the others; DeepSpeed trains in groups of its own."""
    groups: list[Any] = list(torch.distributed.distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def elsewhere(worker: Any, folder: Path, to: str) -> dict[str, Any]:
    return moved(Runs(worker.rank, worker.size, folder), to)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def both(folder: Path) -> dict[str, Any]:
    return run_workers(everything, 2, folder, limit=LIMIT)[0]


@pytest.fixture(scope="module")
def rest(folder: Path) -> dict[tuple[str, int], tuple[Trained, Trained]]:
    return run_workers(others, 2, folder, limit=LIMIT)[0]


def assert_equal(one: Trained, other: Trained, most: float) -> None:
    assert distance(one, other) <= most
    assert [row["step"] for row in one.rows] == [row["step"] for row in other.rows]
    for a, b in zip(one.rows, other.rows, strict=True):
        for name in ("train_loss", "test_loss"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=0, abs=most)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", FEW)
def test_a_strategy_equals_ddp_or_is_refused(name: str, stage: int, both: dict[str, Any]) -> None:
    assert_served_or_refused(name, stage, both["pairs"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", sorted(CASES.keys() - FEW))
def test_each_other_strategy_equals_ddp_or_is_refused(name: str, stage: int, rest: dict[tuple[str, int], Any]) -> None:
    assert_served_or_refused(name, stage, rest)


def assert_served_or_refused(name: str, stage: int, found: dict[tuple[str, int], Any]) -> None:
    if offered(name, stage):
        assert_equal(*found[name, stage], most=CLOSE)
        return
    with pytest.raises(PlanError, match=f"engine deepspeed stage {stage} lacks .*: use engine (solo|ddp)"):
        check(edited(name), variant(*at(stage)))


def test_the_refusal_names_the_stage_that_would_do() -> None:
    with pytest.raises(PlanError, match=r"use engine solo or ddp or deepspeed stage 0$"):
        check(edited("lars"), "deepspeed stage 2")


@pytest.mark.parametrize("stage", STAGES)
def test_who_shares_out_an_optimizers_state(stage: int) -> None:
    name, options = at(stage)
    assert make_worker(name, options, "fp32", 0, 2, torch.device("cpu")).holders == (2 if stage else 1)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["sgd", "adamw", "norm", "bf16"])
def test_each_stage_trains_as_ddp(kind: str, stage: int, both: dict[str, Any]) -> None:
    assert_equal(both["stages"][kind], both["stages"][kind, stage], CLOSE)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_not_fp32(stage: int, both: dict[str, Any]) -> None:
    assert distance(both["stages"]["bf16", stage], both["stages"]["sgd", stage]) > 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_of_unequal_size_make_one_batch(stage: int, both: dict[str, Any]) -> None:
    assert_equal(both["stages"]["sgd"], both["stages"]["parts", stage], CLOSE)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_the_same_bit_for_bit(stage: int, both: dict[str, Any]) -> None:
    assert distance(both["stages"]["adamw", stage], both["stages"]["resumed", stage]) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_ends_the_trial(stage: int, both: dict[str, Any]) -> None:
    assert both["stages"]["bad", stage] == "diverged"


@pytest.fixture(scope="module")
def continued(both: dict[str, Any], folder: Path) -> dict[str, Any]:
    alone = run_workers(elsewhere, 1, folder, "one", limit=LIMIT)[0]
    return both["stages"] | alone | run_workers(elsewhere, 4, folder, "four", limit=LIMIT)[0]


@pytest.mark.parametrize("engine", ["ddp", "zero", "spread"])
@pytest.mark.parametrize("to", ["one", "two", "four"])
@pytest.mark.parametrize("source", SAVED)
def test_a_checkpoint_goes_on_anywhere(source: object, to: str, engine: str, continued: dict[str, Any]) -> None:
    """The loss of the first row after the restart probes weights and optimizer; the last weights, the whole way."""
    unbroken, other = continued["adamw"], continued[f"{source} {to} {engine}"]
    rows = [{row["step"]: row["train_loss"] for row in trained.rows} for trained in (unbroken, other)]
    assert rows[1][BROKEN_AT + 1] == pytest.approx(rows[0][BROKEN_AT + 1], rel=0, abs=EXACT)
    assert_equal(unbroken, other, CLOSE)


def test_nothing_is_built_and_no_lock_is_waited_for(both: dict[str, Any]) -> None:
    assert both["extensions"] == ["deepspeed_shm_comm", "lock"]


def test_no_process_group_waits_longer_than_that_of_the_gang(both: dict[str, Any]) -> None:
    assert len(both["limits"]) > 1 and set(both["limits"]) == {workers.LIMIT}


def test_the_bucket_is_that_of_the_recipe_and_no_larger_than_the_model(both: dict[str, Any]) -> None:
    weights = both["stages"]["sgd"].weights
    assert both["buckets"] == [sum(w.numel() for w in weights.values()), int(1e-4 * 2**18)]


def test_an_open_model_is_refused() -> None:
    worker = make_worker(*at(1), "fp32", 0, 1, torch.device("cpu"))
    with pytest.raises(PlanError, match="needs it open: use engine ddp"):
        worker.prepare(torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), True)  # type: ignore[arg-type]


def test_the_table_in_the_docs_is_current() -> None:
    text = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    assert text.split(BEGIN)[1].split(END)[0].strip() == table().strip()
