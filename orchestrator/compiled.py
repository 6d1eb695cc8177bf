"""torch.compile of a network, and what it cannot do."""

from __future__ import annotations

from typing import Literal

from strategies.contract import Learner, PlanError, Worker
from strategies.net import Net
from strategies.parts.passes import passes


def compile_(net: Net, how: Literal["off", "default", "cuda_graphs"]) -> None:
    """In place; `Speed.compile` says how."""
    if how == "off":
        return
    from torch._dynamo import config

    config.skip_nnmodule_hook_guards = False  # methods hook the network when passes to find its size have compiled it
    net.compile(mode="reduce-overhead" if how == "cuda_graphs" else None)


def check_graphs(learner: Learner, local: int, micro: int, worker: Worker) -> None:
    """Raises PlanError where a step adds up gradients of several passes: CUDA graphs write each over the one before."""
    if worker.device.type != "cuda":
        return
    several = passes(getattr(learner, "gradient", None))
    if several > 1:
        raise PlanError(
            f"speed.compile: cuda_graphs takes one backward pass per step, but this method takes {several}: "
            "compile: default takes any number"
        )
    if micro < local:
        raise PlanError(
            f"speed.compile: cuda_graphs takes one backward pass per step, but a worker's {local} examples go in "
            f"micro-batches of {micro}: take compile: default, a larger base.micro_batch or more workers"
        )
