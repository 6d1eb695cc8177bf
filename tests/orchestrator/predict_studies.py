"""Studies whose step times and steps to target follow a law that is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orchestrator.batch_law.law import Law
from orchestrator.predict.hardware import Hardware, Link
from orchestrator.predict.step_time import Compute, Load, step_seconds
from tests.orchestrator.made_study import MadeStudy

LAW = Law(steps_min=400, critical=512)
COMPUTE = Compute(per_pass=0.004, per_example=0.0002)
NETWORK = Hardware(name="known", network=Link(latency=1e-4, bandwidth=2e9), algorithm="ring", price=3.0)
PARAMETERS = 20_000_000  # 76 MiB of gradient: four buckets
BATCHES = (32, 64, 128, 256, 512, 1024)


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
) -> Path:
    """Trials with steps and step times of the truth, each times exp(noise z)."""
    generator, made = np.random.default_rng(workers), MadeStudy(path)
    for batch in batches:
        for seed in range(seeds):
            share = -(-batch // workers)
            load = Load(workers, share, -(-share // (micro_batch or share)))
            seconds = step_seconds(compute, network, 4 * PARAMETERS, load) * np.exp(noise * generator.standard_normal())
            steps = law.steps(batch) * np.exp(noise * generator.standard_normal())
            changes = {"workers": workers, "micro_batch": micro_batch or share, "parameters": PARAMETERS}
            made.add(arm, batch, seed, round(steps), examples_per_second=batch / seconds, **changes)
    return path
