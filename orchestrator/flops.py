"""Floating-point operations of training, counted once per phase: what a study can compare where machines or loads differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from orchestrator.micro_batch import out_of_memory, rehearse
from strategies.contract import Batch, Worker
from strategies.net import Net


def per_example(net: Net, batch: Batch, worker: Worker) -> float:
    """Of a forward and a backward pass, in convolutions, matrix products and attention; a multiplication with its addition
    counts as 2. What a method does beyond these passes does not count. `batch`: two examples, so that batch norms work;
    NaN where they do not fit into memory."""
    try:
        with Counter() as counter:
            rehearse(net, batch.x, worker)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return math.nan
    return counter.flops / len(batch)


class Counter(TorchDispatchMode):
    """Counts by torch's formulae. torch's own FlopCounterMode loads its compiler at first use, which takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch would load the compiler here, too

    def __torch_dispatch__(
        self, op: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = op(*args, **(kwargs or {}))
        formula: Callable[..., int] | None = FORMULAE.get(op._overloadpacket)
        if formula:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def convolution_gradients(grad: Tensor, x: Tensor, weight: Tensor, *others: Any, out_val: object) -> int:
    """Of inputs and of weights: each costs as much as the convolution. torch's formula counts the second once per group."""
    *_, transposed, _, _, wanted = others
    return sum(wanted[:2]) * conv_flop_count(list(x.shape), list(weight.shape), list(grad.shape), transposed=transposed)


FORMULAE = flop_registry | {torch.ops.aten.convolution_backward: convolution_gradients}
