"""What the workers of all engines have in common: a process that holds the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from cluster.engines.groups import groups
from strategies.contract import Pending, PlanError

if TYPE_CHECKING:
    from strategies.net import Net


class Done:
    """A collective of one worker."""

    def wait(self) -> None:
        """At once."""


class ProcessWorker:
    """One of `size` processes, alone or in the default process group. See `strategies.contract.Worker`."""

    roles = 1
    holders = 1
    memory: Any = None

    def __init__(self, rank: int, size: int, device: torch.device, precision: str):
        self.rank, self.size, self.device, self.precision = rank, size, device, precision

    def take_roles(self, roles: int) -> None:
        if self.size % roles:
            raise PlanError(f"the plan has {roles} roles, the gang {self.size} workers: take a multiple of {roles}")
        self.roles = roles

    @property
    def role(self) -> int:
        return self.rank % self.roles

    @property
    def replica(self) -> int:
        return self.rank // self.roles

    @property
    def replicas(self) -> int:
        return self.size // self.roles

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def backward(self, value: Tensor, grad: Tensor | None = None) -> None:
        value.backward(grad)

    def sum_(self, t: Tensor) -> Tensor:
        if self.size > 1:
            dense = t.detach().contiguous()  # `t` itself where it is contiguous already
            dist.all_reduce(dense)
            if dense.data_ptr() != t.data_ptr():
                t.detach().copy_(dense)
        return t

    def reduce(self, t: Tensor, to: int) -> Pending:
        return Done() if self.size == 1 else dist.reduce(t, to, async_op=True)

    def broadcast(self, t: Tensor, source: int, among: Sequence[int]) -> Pending:
        return Done() if len(among) == 1 else dist.broadcast(t, source, self._group(tuple(among)), async_op=True)

    def _group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The process group of some of the workers; None: that of all."""
        return None if len(ranks) == self.size else groups.among(ranks)

    def sum_role_(self, t: Tensor) -> Tensor:
        if self.replicas > 1:
            dist.all_reduce(t, group=self._group(tuple(range(self.role, self.size, self.roles))))
        return t

    def send(self, t: Tensor, role: int) -> Pending:
        raise PlanError("this engine has no roles: every worker holds the whole model")

    def recv(self, t: Tensor, role: int) -> Pending:
        raise PlanError("this engine has no roles: every worker holds the whole model")

    def prepare(self, net: Net, optimizer: Optimizer, open_model: bool) -> nn.Module:
        return net

    def whole(self, optimizer: Optimizer) -> Any:
        return optimizer

    def settle(self) -> None:
        """Make `memory` alike on all workers."""

    def gather(self, optimizer: bool = False) -> None:
        """Nothing is spread: weights and optimizer state are whole."""

    def micro(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def average(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Make the gradients that `optimizer` will use alike on all workers: their mean."""

    def apply(
        self, model: nn.Module, optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        self.average(model, optimizer)
        before()
        optimizer.step()
        after()
        optimizer.zero_grad(set_to_none=True)
