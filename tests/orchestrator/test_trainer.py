"""The trainer on plans of its own: phases, sharing, resuming twice, divergence, stopping, memory."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.engines import make_worker
from orchestrator.recipe.schema import Speed
from orchestrator.recipe.workload_schema import Interval, Target
from strategies.contract import Batch, ModelSpec, Plan
from strategies.net import Net
from strategies.optimizers import AdamW
from strategies.rate import Rate
from tests.strategies.harness import Blobs, Pair, baseline, distance, tiny_net, train


def two_phases(second_rate: float = 0.05) -> Plan:
    (first,) = baseline(epochs=2).phases
    learner = dataclasses.replace(first.learner, rate=Rate(second_rate))  # type: ignore[type-var]
    return Plan((first, dataclasses.replace(first, name="second", epochs=1, learner=learner)))


def without_seconds(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_phases_follow_each_other(tmp_path: Path) -> None:
    trained = train(two_phases(), tmp_path)
    assert [row["step"] for row in trained.rows] == list(range(1, 13))
    assert [row["phase"] for row in trained.rows] == [0] * 8 + [1] * 4
    assert trained.progress.status == "done" and trained.progress.examples == 144


def set_from_data(net: Net, read: Callable[[int], Batch]) -> None:
    nn.init.constant_(net.head.bias, read(5).x.mean().item())  # type: ignore[arg-type]


def seen_doubled(batch: Batch, net: Net) -> Batch:
    return dataclasses.replace(batch, x=2 * batch.x)


def test_initialise_sets_the_weights_of_a_phase_that_takes_none_over(tmp_path: Path) -> None:
    """From the first examples as the phase sees them; the second phase goes on from the first one's weights."""
    still = dataclasses.replace(two_phases().phases[0].learner, rate=Rate(0.0))  # type: ignore[type-var]
    phases = [dataclasses.replace(p, learner=still, source=seen_doubled) for p in two_phases().phases]
    first, second = (dataclasses.replace(p, initialise=(set_from_data,)) for p in phases)
    expected = [2 * Blobs().x[:5].mean().item()] * 3
    assert train(Plan((first,)), tmp_path / "one").weights["head.bias"].tolist() == pytest.approx(expected, abs=1e-15)
    kept = train(Plan((phases[0], second)), tmp_path / "two").weights["head.bias"].tolist()
    assert kept == train(Plan((phases[0],)), tmp_path / "none").weights["head.bias"].tolist() != expected


def test_a_shared_phase_is_trained_once_and_changes_nothing(tmp_path: Path) -> None:
    train(two_phases(0.05), tmp_path)
    (tmp_path / "trial" / "metrics.jsonl").unlink()
    shared = train(two_phases(0.02), tmp_path)  # its first phase is on file
    alone = train(two_phases(0.02), tmp_path / "elsewhere", Blobs())
    assert shared.progress.reused_steps == 8 and alone.progress.reused_steps == 0
    assert distance(shared, alone) == 0
    assert without_seconds(shared.rows) == without_seconds(alone.rows)


@pytest.mark.parametrize("name", ["weights.safetensors", "record.json"])
def test_a_damaged_phase_is_trained_again(tmp_path: Path, name: str) -> None:
    first = train(baseline(), tmp_path)
    (file,) = (tmp_path / "phases").glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="damaged phase passed over"):
        again = train(baseline(), tmp_path)
    assert again.progress.reused_steps == 0 and distance(first, again) == 0
    assert train(baseline(), tmp_path).progress.reused_steps == 12


@pytest.mark.parametrize("make", [baseline, two_phases])
def test_killed_at_every_step_twice(tmp_path: Path, make: Callable[[], Plan]) -> None:
    unbroken = train(make(), tmp_path / "unbroken")
    for step in range(len(unbroken.rows) - 1):
        folder = tmp_path / str(step)
        for at in (step, step + 1):
            with pytest.raises(InterruptedError):
                train(make(), folder, Blobs(fail_at=at * 12), save_seconds=0)
        resumed = train(make(), folder, save_seconds=0)
        assert distance(resumed, unbroken) == 0
        assert without_seconds(resumed.rows) == without_seconds(unbroken.rows)


def test_a_damaged_checkpoint_costs_steps_not_the_result(tmp_path: Path) -> None:
    unbroken = train(baseline(), tmp_path / "unbroken")
    with pytest.raises(InterruptedError):
        train(baseline(), tmp_path / "broken", Blobs(fail_at=96), save_seconds=0)
    newest = max((tmp_path / "broken/trial/checkpoints").glob("step_*"))
    (newest / "state.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged"):
        resumed = train(baseline(), tmp_path / "broken", save_seconds=0)
    assert distance(resumed, unbroken) == 0


@pytest.mark.parametrize("lost", [1, 2])
def test_a_checkpoint_that_outlived_its_rows_is_passed_over(tmp_path: Path, lost: int) -> None:
    """After a power failure, or in a copy of the study that lacks rows: no hole is left in the curve."""
    unbroken = train(baseline(), tmp_path / "unbroken")
    with pytest.raises(InterruptedError):
        train(baseline(), tmp_path / "broken", Blobs(fail_at=96), save_seconds=0)
    rows = tmp_path / "broken" / "trial" / "metrics.jsonl"
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:-lost]))
    with pytest.warns(UserWarning, match="passed over: the rows of metrics end at step"):
        resumed = train(baseline(), tmp_path / "broken", save_seconds=0)
    assert distance(resumed, unbroken) == 0
    assert without_seconds(resumed.rows) == without_seconds(unbroken.rows)


def test_rows_are_on_the_disk_before_the_checkpoint_of_their_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "trial" / "metrics.jsonl"
    fsync, rename = os.fsync, os.rename
    synced, saved = [0], []

    def flush(file: int) -> None:
        fsync(file)
        if rows.exists() and os.path.samestat(os.fstat(file), rows.stat()):
            synced.append(len(rows.read_bytes().splitlines()))

    def move(part: Path, final: Path) -> None:
        if final.name.startswith("step_"):
            saved.append((int(final.name[5:]), synced[-1]))
        rename(part, final)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "rename", move)
    train(baseline(), tmp_path, save_seconds=0)
    assert saved == [(step, step) for step in range(1, 12)]


@pytest.mark.parametrize("peak", [1e9, 30.0])
def test_divergence_ends_the_trial(tmp_path: Path, peak: float) -> None:
    """1e9: not finite within steps. 30: finite, and too high for too long."""
    plan = baseline(epochs=50)
    (phase,) = plan.phases
    learner = dataclasses.replace(phase.learner, rate=Rate(peak))  # type: ignore[type-var]
    plan = Plan((dataclasses.replace(phase, learner=learner),))
    ended = train(plan, tmp_path)
    assert ended.progress.status == "diverged" and not ended.weights and len(ended.rows) < 60


def test_stop_at_the_target(tmp_path: Path) -> None:
    full = train(baseline(epochs=10), tmp_path / "full")
    first = next(row["step"] for row in full.rows if row.get("test_accuracy", 0) >= 0.8)
    stopped = train(baseline(epochs=10), tmp_path / "stopped", target=Target(test_accuracy=0.8, stop=True))
    assert stopped.progress.steps == first < full.progress.steps


def test_evaluation_interval_in_steps_and_epochs(tmp_path: Path) -> None:
    rows = train(baseline(), tmp_path, evaluate=Interval(steps=5)).rows
    assert [row["step"] for row in rows if "test_loss" in row] == [5, 10, 12]


def test_rows_agree_with_the_loss_by_hand(tmp_path: Path) -> None:
    """The first row's loss is the mean cross-entropy of the first global batch under the initial weights."""
    from strategies.contract import mix

    torch.manual_seed(mix(0, "init", 0))
    net = tiny_net((6,), 3).double()
    batch = Blobs().train(0, 12)
    expected = nn.functional.cross_entropy(net(batch.x), batch.y).item()
    assert train(baseline(), tmp_path).rows[0]["train_loss"] == pytest.approx(expected, abs=1e-15)


# ------------------------------------------------------------------------------------------------------ batch norm


def normed_net(inputs: tuple[int, ...], classes: int) -> Net:
    return Net([nn.Linear(inputs[0], 8), nn.BatchNorm1d(8), nn.Tanh()], head=nn.Linear(8, classes))


def normed(epochs: float = 3) -> Plan:
    (phase,) = baseline(epochs=epochs).phases
    return Plan((dataclasses.replace(phase, model=ModelSpec(normed_net)),))


def test_batch_norm_resumes_exactly_on_two_workers(tmp_path: Path) -> None:
    """Running statistics differ between workers; they are averaged at each row, so a checkpoint holds those of all."""
    pair = Pair(tmp_path / "rendezvous")
    try:
        unbroken = pair.train(normed(), tmp_path / "unbroken", save_seconds=0)
        with pytest.raises(AssertionError, match="planted fault"):
            pair.train(normed(), tmp_path / "broken", data=Blobs(fail_at=60), save_seconds=0)
    finally:
        pair.close()
    pair = Pair(tmp_path / "again")
    try:
        resumed = pair.train(normed(), tmp_path / "broken", save_seconds=0)
    finally:
        pair.close()
    assert distance(resumed, unbroken) == 0
    assert without_seconds(resumed.rows) == without_seconds(unbroken.rows)


# ---------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Limited:
    """Builds a net that runs out of memory above `limit` examples."""

    limit: int

    def __call__(self, inputs: tuple[int, ...], classes: int) -> Net:
        net = normed_net(inputs, classes)
        net.register_forward_pre_hook(self._check)
        return net

    def _check(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if module.training and len(args[0]) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")


def test_the_micro_batch_is_halved_until_it_fits(tmp_path: Path) -> None:
    (phase,) = baseline().phases
    plan = Plan((dataclasses.replace(phase, model=ModelSpec(Limited(4))),))
    found = train(plan, tmp_path / "found", micro_batch=None)
    stated = train(plan, tmp_path / "stated", micro_batch=3)
    assert distance(found, stated) == 0  # 12 -> 6 -> 3, and looking for it left no trace in the running statistics


def test_not_even_one_example_fits(tmp_path: Path) -> None:
    (phase,) = baseline().phases
    plan = Plan((dataclasses.replace(phase, model=ModelSpec(Limited(0))),))
    with pytest.raises(MemoryError, match="not even one example"):
        train(plan, tmp_path, micro_batch=None)


def test_adamw_resumes_exactly(tmp_path: Path) -> None:
    (phase,) = baseline().phases
    learner = dataclasses.replace(phase.learner, optimizer=AdamW())  # type: ignore[type-var]
    plan = Plan((dataclasses.replace(phase, learner=learner),))
    unbroken = train(plan, tmp_path / "unbroken")
    with pytest.raises(InterruptedError):
        train(plan, tmp_path / "broken", Blobs(fail_at=60), save_seconds=0)
    assert distance(train(plan, tmp_path / "broken"), unbroken) == 0


REAL_MEMORY = """
import resource, torch
from cluster.engines import make_worker
from orchestrator.micro_batch import largest
from orchestrator.workloads import build_network
from strategies.contract import Batch
torch.set_num_threads(1)
net = build_network((1, 8, 8), 10, "small_cnn", width=16, batch_norm=True)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)
sample = lambda n: Batch(torch.zeros(n, 1, 8, 8), torch.zeros(n, dtype=torch.int64), torch.arange(n))
print(largest(net, sample, 2**18, make_worker("solo", {}, "fp32", 0, 1, torch.device("cpu"))))
"""


def test_memory_that_really_runs_out() -> None:
    """262,144 examples need gigabytes; the process may have 600 MiB more than it holds."""
    done = subprocess.run([sys.executable, "-c", REAL_MEMORY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert 64 <= int(done.stdout) < 2**18


def test_divergence_is_decided_in_step_by_all_workers(tmp_path: Path) -> None:
    (phase,) = baseline(epochs=50).phases
    learner = dataclasses.replace(phase.learner, rate=Rate(1e9))  # type: ignore[type-var]
    pair = Pair(tmp_path / "rendezvous")
    try:
        ended = pair.train(Plan((dataclasses.replace(phase, learner=learner),)), tmp_path)
        assert ended.progress.status == "diverged" and not ended.weights
        assert distance(pair.train(baseline(), tmp_path / "next"), train(baseline(), tmp_path / "alone")) < 1e-12
    finally:
        pair.close()


def test_bfloat16_trains(tmp_path: Path) -> None:
    worker = make_worker("solo", {}, "bf16", 0, 1, torch.device("cpu"))
    trained = train(baseline(epochs=10), tmp_path, data=Blobs(dtype=torch.float32), worker=worker)
    plain = train(baseline(epochs=10), tmp_path / "plain")
    assert {v.dtype for v in trained.weights.values()} == {torch.float32}
    assert 1e-5 < distance(trained, plain) < 0.3 and trained.rows[-1]["test_accuracy"] > 0.9


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    compiled = []
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda net, **how: compiled.append(how) or compile(net, **how))
    plain = train(baseline(), tmp_path / "plain")
    quick = train(baseline(), tmp_path / "quick", speed=Speed(patch_convolutions=False, compile="default"))
    assert compiled == [{"mode": None}] and distance(plain, quick) < 1e-12
