"""The trial whose overhead is measured: a network is built and takes one step, on each worker of a gloo process group.

Run under torchrun (`python -m benchmarks.one_step`), it is a whole trial of a shell loop.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel


def one_step(wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel) -> float:
    """The loss of the step on this worker."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model = wrap(net)
    x, y = torch.randn(32, 64), torch.randint(10, (32,))
    loss: Tensor = cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def on_gang(worker: Any, argument: None) -> float:
    """As a task of a gang, whose process group is up."""
    return one_step()


class Member:
    """A worker of a group of two, for Ray actors that somebody else keeps warm."""

    def __init__(self, rank: int, meeting: str):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)

    def step(self) -> float:
        return one_step()


def meeting() -> str:
    """A file at which the members of a new group meet."""
    return os.path.join(tempfile.mkdtemp(), "meeting")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    one_step()
    dist.destroy_process_group()
