"""The automatic micro-batch: the largest that fits into memory, found before the first step so that no trial dies of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from strategies.contract import Batch, Worker
from strategies.net import Net

STATE = 3  # times the weights, held by a step beside its passes: two moments, gradients on their way
SIGNS = ("out of memory", "not enough memory", "can't allocate memory")

T = TypeVar("T")


class MicroBatches(Sequence[Batch]):
    """The micro-batches of a step at these bounds, each made whenever it is asked for: a step holds one at a time."""

    def __init__(self, bounds: Sequence[tuple[int, int]], make: Callable[[int, int], Batch]):
        self.bounds, self.make = bounds, make

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        return self.make(*self.bounds[index])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error tells that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def unless_memory_ends(function: Callable[[], T], device: torch.device) -> T | None:
    """What it gives; or None, with all released that it held, where memory runs out."""
    try:
        return function()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    release(device)  # only now that the error is gone, and with it the frames that hold tensors
    return None


def largest(net: Net, sample: Callable[[int], Batch], limit: int, worker: Worker) -> int:
    """The micro-batch, at most `limit`, at which a forward and a backward pass fit on every worker, beside an optimizer's
    state; halved until it does.

    `sample(n)` gives n examples. The net is left as it was. Raises MemoryError if not even one example fits.
    """
    while not _all_agree(_fits(net, sample, limit, worker), worker):
        if limit == 1:
            raise MemoryError("not even one example fits into memory: choose a smaller model")
        limit = -(-limit // 2)
    return limit


def rehearse(net: Net, x: torch.Tensor, worker: Worker) -> None:
    """A forward and a backward pass as in training; the net is left as it was."""
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    try:
        net.train()
        with worker.autocast():
            out = net(x)
        if out.requires_grad:
            out.float().sum().backward()
    finally:
        net.zero_grad(set_to_none=True)
        net.load_state_dict(buffers, strict=False)


def _fits(net: Net, sample: Callable[[int], Batch], size: int, worker: Worker) -> bool:
    weights = sum(p.nbytes for p in net.parameters() if p.requires_grad)

    def passes() -> bool:
        _held = torch.empty(STATE * weights // worker.holders, dtype=torch.uint8, device=worker.device)
        rehearse(net, sample(size).x, worker)
        return True

    fits = unless_memory_ends(passes, worker.device) is not None
    release(worker.device)
    return fits


def _all_agree(flag: bool, worker: Worker) -> bool:
    return worker.sum_(torch.tensor(float(not flag), device=worker.device)).item() == 0


def release(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
