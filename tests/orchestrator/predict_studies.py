"""Studies whose step times and steps to target follow a truth that is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.batch_law.law import Law
from orchestrator.predict.hardware import Hardware, Link
from orchestrator.predict.step_time import Compute, Load, step_seconds
from tests.orchestrator.made_study import EXAMPLES, MadeStudy

LAW = Law(steps_min=400, critical=512)
COMPUTE = Compute(per_pass=0.004, per_example=0.0002)
NETWORK = Hardware(name="known", network=Link(latency=1e-4, bandwidth=2e9), algorithm="ring", price=3.0)
PARAMETERS = 20_000_000  # 76 MiB of gradient: five buckets
BATCHES = (32, 64, 128, 256, 512, 1024)


class TimedStudy(MadeStudy):
    """Evaluated at the step that reaches the target and at the one before, or at the last if none does."""

    def _rows(self, result: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        step = (result["target"] or {}).get("step") or result["steps"]
        rows = ((s, {"test_accuracy": 0.96 if s == step else 0.94}) for s in (step - 1, step))
        return [{"step": s, "epoch": s * result["batch"] / EXAMPLES, **metrics} for s, metrics in rows]


def step_of(workers: int, batch: int, micro_batch: int | None = None) -> Load:
    share = -(-batch // workers)
    return Load(workers, share, -(-share // (micro_batch or share)))


def study(
    path: Path,
    workers: int = 1,
    batches: Sequence[int] = BATCHES,
    seeds: int = 3,
    noise: float = 0.01,
    law: Law = LAW,
    micro_batch: int | None = None,
    network: Hardware = NETWORK,
    compute: Compute = COMPUTE,
    arm: str = "sgd",
    draw: int = 0,
    target: tuple[str, float] | None = ("test_accuracy", 0.95),
    **changes: Any,
) -> Path:
    """Trials with steps and step times of the truth, each times exp(noise z)."""
    generator, made = np.random.default_rng([workers, draw]), TimedStudy(path, target=target)
    for batch in batches:
        for seed in range(seeds):
            load = step_of(workers, batch, micro_batch)
            seconds = step_seconds(compute, network, 4 * PARAMETERS, load) * np.exp(noise * generator.standard_normal())
            steps = round(law.steps(batch) * np.exp(noise * generator.standard_normal()))
            known: dict[str, Any] = {
                "workers": workers,
                "micro_batch": micro_batch or load.local_batch,
                "parameters": PARAMETERS,
            }
            known["examples_per_second"] = batch / seconds
            made.add(arm, batch, seed, steps, **{**known, **changes})
    return path
