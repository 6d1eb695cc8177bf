"""Floating-point operations of training, counted once per phase: what a study can compare where machines or loads differ."""

from __future__ import annotations

import math

from torch.utils.flop_counter import FlopCounterMode

from orchestrator.micro_batch import out_of_memory, rehearse
from strategies.contract import Batch, Worker
from strategies.net import Net


def per_example(net: Net, batch: Batch, worker: Worker) -> float:
    """Of a forward and a backward pass, in convolutions, matrix products and attention; a multiplication with its addition
    counts as 2. What a method does beyond these passes does not count. `batch`: `net.sample` examples;
    NaN where they do not fit into memory."""
    try:
        with FlopCounterMode(display=False) as counter:
            rehearse(net, batch.x, worker)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return math.nan
    return counter.get_total_flops() / len(batch)
