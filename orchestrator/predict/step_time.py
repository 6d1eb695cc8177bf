"""Seconds of one optimizer step: passes over micro-batches, and a sum of gradients that hides behind the last backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from orchestrator.batch_law.censored import Array
from orchestrator.predict.hardware import Hardware
from orchestrator.predict.stragglers import delay

MIB = 1 << 20
FIRST_BUCKET, BUCKET = 1 * MIB, 25 * MIB  # of DistributedDataParallel
BACKWARD = (
    2 / 3
)  # of a pass over a micro-batch: a gradient by the inputs and one by the weights for each forward product


@dataclass(frozen=True, slots=True)
class Compute:
    """What one worker does in a step, in seconds."""

    per_pass: float  # however small the micro-batch: launches, memory, and the optimizer where it cannot be told apart
    per_example: float
    per_step: float = 0.0  # however many passes: the optimizer
    slowdown: float = 0.0  # of computing while gradients travel, a fraction

    def one_pass(self, micro_batch: float) -> float:
        return self.per_pass + self.per_example * micro_batch


@dataclass(frozen=True, slots=True)
class Load:
    """One step as its workers see it."""

    workers: int
    local_batch: float  # examples per worker
    passes: int  # over micro-batches of local_batch / passes

    @property
    def micro_batch(self) -> float:
        return self.local_batch / self.passes


@lru_cache
def bucket_sizes(size: int) -> tuple[int, ...]:
    """Bytes of each bucket of a gradient of `size` bytes, in the order in which the backward pass fills them."""
    rest = max(0, size - FIRST_BUCKET)
    full, last = divmod(rest, BUCKET)
    return (min(size, FIRST_BUCKET), *[BUCKET] * full, *([last] if last else []))


def ends(ready: Sequence[float] | Array, durations: Sequence[float] | Array) -> Array:
    """When the sum of each bucket is done: they follow one another, none before it is ready."""
    total = np.cumsum(durations)
    return np.maximum.accumulate(np.asarray(ready) - (total - durations)) + total


def exposed(ready: Sequence[float] | Array, durations: Sequence[float] | Array, backward: float) -> float:
    """Seconds by which the last sum outlasts the backward pass."""
    return max(0.0, float(ends(ready, durations)[-1]) - backward)


def step_seconds(compute: Compute, hardware: Hardware, gradient: int, load: Load) -> float:
    """Seconds of a step with `gradient` bytes to sum.

    Buckets are ready in proportion to their bytes. The sums wait for the slowest worker, so its time is that of all.
    """
    slowest = 1 + hardware.jitter * delay(load.workers)
    one = compute.one_pass(load.micro_batch) * slowest
    rest = compute.per_step + (load.passes - 1) * one
    if load.workers == 1:
        return rest + one
    sizes = bucket_sizes(gradient)
    cost = {size: hardware.all_reduce(size, load.workers) for size in set(sizes)}
    durations, backward = np.array([cost[size] for size in sizes]), BACKWARD * one
    late = exposed(backward * np.cumsum(sizes) / gradient, durations, backward)
    return rest + one + late + compute.slowdown * (float(durations.sum()) - late)
