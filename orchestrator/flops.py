"""Floating-point operations of training, counted once per phase: what a study can compare where machines or loads differ."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode

from orchestrator.micro_batch import rehearse
from strategies.contract import Batch, Worker
from strategies.net import Net


def per_example(net: Net, batch: Batch, worker: Worker) -> float:
    """Of a forward and a backward pass, in convolutions, matrix products and attention; a multiplication with its addition
    counts as 2. What a method does beyond these passes does not count. `batch`: two examples, so that batch norms work."""
    with FlopCounterMode(display=False) as counter:
        rehearse(net, batch.x, worker)
    return counter.get_total_flops() / len(batch)
