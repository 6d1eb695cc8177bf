"""Curves for the tests of the batch law: published ones, and made-up ones whose law is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orchestrator.batch_law.law import Law, Point

PUBLIC = Path(__file__).parent / "data" / "public_curves.json"
TRUTH = Law(steps_min=1000, critical=512)
POWERS = tuple(2.0**i for i in range(4, 15))


def made(
    seed: int,
    law: Law = TRUTH,
    batches: Sequence[float] = POWERS,
    trials: int = 5,
    noise: float = 0.1,
    grain: float = 0,
    budget: float = math.inf,
) -> list[Point]:
    """Log-normal steps, seen every `grain` steps up to a budget; with a grain of 0, exactly."""
    generator = np.random.default_rng(seed)
    steps = [(b, s) for b in batches for s in law.steps(b) * np.exp(noise * generator.standard_normal(trials))]
    return [_seen(batch, float(s), grain, budget) for batch, s in steps]


def _seen(batch: float, steps: float, grain: float, budget: float) -> Point:
    if steps > budget:
        return Point(batch, budget, math.inf)
    upper = math.ceil(steps / grain) * grain if grain else steps
    return Point(batch, upper - grain, upper)
