"""Engines: how gradients are averaged over workers. Which one offers what, and how to make one's worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from strategies.contract import Need, PlanError, Worker

if TYPE_CHECKING:
    import torch

WHOLE_MODEL = Need.LAYER_GRADS | Need.LAYER_WEIGHTS | Need.OPEN_MODEL | Need.EDIT_WEIGHTS
OFFERS: dict[str, Need] = {
    "solo": WHOLE_MODEL,
    "ddp": WHOLE_MODEL | Need.ROLES,
    "deepspeed stage 0": WHOLE_MODEL & ~Need.OPEN_MODEL,
    "deepspeed stage 1": Need.LAYER_WEIGHTS,
    "deepspeed stage 2": Need.LAYER_WEIGHTS,
    "deepspeed stage 3": Need.NOTHING,
}
ENGINES = ("solo", "ddp", "deepspeed")


def variant(engine: str, options: Mapping[str, Any]) -> str:
    """The key of OFFERS: what an engine offers may depend on its options."""
    return f"{engine} stage {options['stage']}" if engine == "deepspeed" else engine


def make_worker(
    engine: str, options: Mapping[str, Any], precision: str, rank: int, size: int, device: torch.device
) -> Worker:
    """The worker of one rank. With `size` > 1, the default process group must be up. Raises PlanError."""
    if engine == "ddp":
        from cluster.engines.ddp import DdpWorker

        return DdpWorker(rank, size, device, precision, **options)
    if engine == "deepspeed":
        from cluster.engines.deepspeed import DeepSpeedWorker

        return DeepSpeedWorker(rank, size, device, precision, **options)
    if engine != "solo":
        raise PlanError(f"engine {engine!r} is unknown: expected one of {', '.join(ENGINES)}")
    if size > 1:
        raise PlanError(f"engine solo trains on 1 worker, the gang has {size}: set engine: ddp, or cluster.workers: 1")
    from cluster.engines.solo import SoloWorker

    return SoloWorker(rank, size, device, precision, **options)
