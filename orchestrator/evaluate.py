"""Test metrics of a learner, each worker on its share of the test set."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from orchestrator.micro_batch import unless_memory_ends
from orchestrator.workloads.order import share
from strategies.contract import Metrics, Phase, State, Worker
from strategies.net import Net
from strategies.parts.replicas import average_

CHUNK = {"cpu": 256, "cuda": 4096}  # examples per forward pass, at most: a CPU's cache holds them, they fill a GPU


@torch.no_grad()
def evaluate(phase: Phase, net: Net, state: State, dataset: Any, worker: Worker) -> dict[str, float]:
    """Means over the whole test set, alike on every rank."""
    begin, end = share(0, dataset.test_examples, worker.rank, worker.size)
    sums: dict[str, torch.Tensor] = {}
    chunk = CHUNK.get(worker.device.type, 256)
    while begin < end:
        stop = min(begin + chunk, end)
        scores = unless_memory_ends(partial(_scores, phase, net, state, dataset, begin, stop), worker.device)
        if scores is None:
            chunk = _halved(stop - begin)
            continue
        sums = {name: value.double() + sums.get(name, 0.0) for name, value in scores.items()}
        begin = stop
    return reduced(sums or _nothing(dataset), worker, dataset.test_examples)


def _scores(phase: Phase, net: Net, state: State, dataset: Any, start: int, stop: int) -> Metrics:
    """Sums over test examples [start, stop)."""
    batch = phase.source(dataset.test(start, stop), net)
    scores: Metrics = dataset.score(_logits(phase, state, batch.x), batch.y)
    return scores


def _halved(chunk: int) -> int:
    if chunk == 1:
        raise MemoryError("not even one test example fits into memory: choose a smaller model")
    return -(-chunk // 2)


def _logits(phase: Phase, state: State, x: torch.Tensor) -> torch.Tensor:
    """(n, ...) -> (n, classes): the weighted mean over the phase's views, in the dtype of `x`."""
    predict = phase.learner.predict
    if not phase.views:
        return predict(state, x)
    total = sum(view.weight for view in phase.views)
    seen = [predict(state, view.change(x)).to(x.dtype) * (view.weight / total) for view in phase.views]
    return torch.stack(seen).sum(0)


def _nothing(dataset: Any) -> dict[str, torch.Tensor]:
    """The share of a rank that has no example, so that all ranks reduce the same names."""
    empty = dataset.test(0, 0)
    logits = torch.zeros(0, dataset.classes, device=empty.y.device)
    return {name: value.double() for name, value in dataset.score(logits, empty.y).items()}


def reduced(sums: dict[str, torch.Tensor], worker: Worker, count: float = 1.0) -> dict[str, float]:
    """Shares of all workers, added up by one collective and divided by `count`."""
    names = sorted(sums)
    total = worker.sum_(torch.stack([sums[name].double() for name in names]))
    return dict(zip(names, (total / count).tolist(), strict=True))


def average_buffers(net: Net, worker: Worker) -> None:
    """Running statistics (batch norm), averaged over workers by one collective per dtype.

    Those of layers in evaluation mode stand still: they are alike, and a mean would only round them. Where workers train
    different modules, it is for the learner to share what each has.
    """
    if worker.size == 1 or worker.roles > 1:
        return
    moving = [b for module in net.modules() if module.training for b in module.buffers(recurse=False)]
    average_([b for b in moving if b.is_floating_point()], worker)
