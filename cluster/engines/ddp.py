"""The engine for several workers that each hold the whole model: torch's DistributedDataParallel, or one flat
all-reduce where a strategy needs the model unwrapped."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from cluster.engines.base import ProcessWorker
from cluster.engines.compression import PowerSgd, bf16_hook
from cluster.engines.shared_memory import WORTH, AverageHook, SharedMemory, shared_memory
from strategies.contract import Pending, PlanError

if TYPE_CHECKING:
    from strategies.net import Net


TAGS = 2**16  # numbers of messages before they begin anew


class DdpWorker(ProcessWorker):
    """Averages gradients over workers. A loss that is to be a mean over the global batch carries `size` as a factor.

    `bucket_mib`: size of DDP's buckets; "auto" is torch's choice, 25 after a first one of 1.
    `compression`: a map with one key that is not None, as the recipe has it; None: gradients are sent as they are.
    `share_memory`: workers of one node sum large tensors through memory instead of sockets.
    """

    memory: PowerSgd | None
    shared: SharedMemory | None = None
    asked: int = 0  # bytes that `shared` was to hold

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        precision: str,
        find_unused_parameters: bool = False,
        bucket_mib: float | Literal["auto"] = "auto",
        compression: Mapping[str, Any] | None = None,
        share_memory: bool = True,
    ):
        super().__init__(rank, size, device, precision)
        self.messages: dict[tuple[str, int], int] = {}  # to and from other roles, so far
        self.share_memory = share_memory and device.type == "cpu"
        self.find_unused_parameters = find_unused_parameters
        self.bucket_mib = None if bucket_mib == "auto" else bucket_mib
        self.compression, self.options = chosen(compression)
        if self.compression != "none" and size == 1:
            raise PlanError(f"engine ddp: compression {self.compression} needs 2 workers or more, got 1: leave it out")
        if self.compression == "powersgd" and find_unused_parameters:
            raise PlanError("engine ddp: compression powersgd cannot find unused parameters: leave one of the two out")

    def prepare(self, net: Net, optimizer: Optimizer, open_model: bool) -> nn.Module:
        self.memory = PowerSgd(net, self.device, **self.options) if self.compression == "powersgd" else None
        self._share(sum(p.nbytes for p in net.parameters() if p.requires_grad))
        if open_model or self.memory or self.size == 1 or not any(p.requires_grad for p in net.parameters()):
            return net
        model = self._wrap(net)
        if self.compression == "bf16":
            model.register_comm_hook(self.size, lambda size, bucket: bf16_hook(size, bucket))  # takes no annotations
        elif self.shared:
            model.register_comm_hook(AverageHook(self.shared), lambda hook, bucket: hook(bucket))
        return model

    def _share(self, gradients: int) -> None:
        """Memory for so many bytes of gradients, unless as much was asked for before."""
        if self.share_memory and gradients >= WORTH and gradients > self.asked:
            self.shared, self.asked = shared_memory(self.rank, self.size, gradients) or self.shared, gradients

    def _wrap(self, net: Net) -> DistributedDataParallel:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # on the newer name of broadcast_buffers, unknown to torch 2.6
            return DistributedDataParallel(
                net,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # running statistics are each worker's own, as in the open model
                find_unused_parameters=self.find_unused_parameters,
                bucket_cap_mb=self.bucket_mib,
            )

    def micro(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return synchronised(model, last) if isinstance(model, DistributedDataParallel) else nullcontext()

    def average(self, model: nn.Module, optimizer: Optimizer) -> None:
        if isinstance(model, DistributedDataParallel):
            if not self.find_unused_parameters:
                check_all_used(model)
        elif self.size > 1:
            params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            if self.memory:
                return self.memory.average(params)
            for dtype in sorted({p.dtype for p in params}, key=str):
                self.average_flat([p for p in params if p.dtype == dtype])

    def average_flat(self, params: Sequence[Tensor]) -> None:
        """One all-reduce. A gradient missing on some ranks counts as 0 there; missing on all, it stays missing."""
        flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in params])
        held = torch.tensor([float(p.grad is not None) for p in params], dtype=flat.dtype, device=flat.device)
        flat = self._sum(torch.cat([flat, held]).mul_(1 / self.size))  # scaled first, then summed, as DDP does
        grads = flat[: -len(params)].split([p.numel() for p in params])
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            if p.grad is not None:
                p.grad.copy_(grad.view_as(p))
            elif flat[i - len(params)]:
                p.grad = grad.view_as(p).clone()

    def _sum(self, flat: Tensor) -> Tensor:
        return self.sum_(flat.to(torch.bfloat16)).to(flat.dtype) if self.compression == "bf16" else self.sum_(flat)

    def sum_(self, t: Tensor) -> Tensor:
        if self.shared and t.nbytes >= WORTH and t.is_contiguous():
            self.shared.sum_(t.detach())
            return t
        return super().sum_(t)

    def send(self, t: Tensor, role: int) -> Pending:
        return self._pending(dist.isend(t, self._peer(role), tag=self._tag("to", role)))

    def recv(self, t: Tensor, role: int) -> Pending:
        return self._pending(dist.irecv(t, self._peer(role), tag=self._tag("from", role)))

    def _peer(self, role: int) -> int:
        return self.replica * self.roles + role

    def _tag(self, way: str, role: int) -> int:
        """Messages are numbered, so that they arrive in order however many are under way."""
        self.messages[way, role] = self.messages.get((way, role), -1) + 1
        return self.messages[way, role] % TAGS

    def _pending(self, work: dist.Work | None) -> Pending:
        assert work is not None, "every worker is part of the group of all"
        return work

    def settle(self) -> None:
        if self.memory:
            self.memory.settle(self)


def chosen(compression: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The variant that is set, and its options."""
    return next(((name, options) for name, options in (compression or {}).items() if options is not None), ("none", {}))


@contextmanager
def synchronised(model: DistributedDataParallel, last: bool) -> Iterator[None]:
    """Around one micro-batch. DDP tells of parameters without gradient in the forward pass of the next step."""
    try:
        with nullcontext() if last else model.no_sync():
            yield
    except RuntimeError as error:
        if "Expected to have finished reduction" not in str(error):
            raise
        indices = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        names = [name for name, p in model.module.named_parameters() if p.requires_grad]
        raise unused([names[int(i)] for i in indices[1].split()] if indices else names) from None


def check_all_used(model: DistributedDataParallel) -> None:
    """DDP leaves the gradients beside an unused parameter unaveraged, and says so one step too late."""
    missing = [name for name, p in model.module.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise unused(missing)


def unused(names: Sequence[str]) -> PlanError:
    return PlanError(
        f"no gradient reached {', '.join(names)}: leave unused parameters out of the model, "
        "or set engine: {ddp: {find_unused_parameters: true}}"
    )
