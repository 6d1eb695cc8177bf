"""Engines: how gradients are averaged over workers. Which one offers what, and how to make one's worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from strategies.contract import Need, PlanError, Worker

if TYPE_CHECKING:
    import torch

WHOLE_MODEL = Need.LAYER_GRADS | Need.OPEN_MODEL | Need.EDIT_WEIGHTS
OFFERS: dict[str, Need] = {"solo": WHOLE_MODEL, "ddp": WHOLE_MODEL}


def make_worker(
    engine: str, options: Mapping[str, Any], precision: str, rank: int, size: int, device: torch.device
) -> Worker:
    """The worker of one rank. With `size` > 1, the default process group must be up. Raises PlanError."""
    if engine == "ddp":
        from cluster.engines.ddp import DdpWorker

        return DdpWorker(rank, size, device, precision, **options)
    if engine != "solo":
        raise PlanError(f"engine {engine!r} is unknown: expected one of {', '.join(OFFERS)}")
    if size > 1:
        raise PlanError(f"engine solo trains on 1 worker, the gang has {size}: set engine: ddp, or cluster.workers: 1")
    from cluster.engines.solo import SoloWorker

    return SoloWorker(rank, size, device, precision, **options)
