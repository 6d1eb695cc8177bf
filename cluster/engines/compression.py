"""Compressed averages of gradients: rounded to bf16, or as products of thin matrices (PowerSGD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future

from strategies.contract import PlanError, Worker

TINY = 1e-30  # so that a gradient of zeros is divided by no zero; lost in the rounding of all others


def bf16_hook(size: int, bucket: dist.GradBucket) -> Future[Tensor]:
    """DDP's average over `size` workers with half the traffic, on gloo as on NCCL (torch's own hook refuses gloo).

    Each worker's share g / size is rounded once, by at most 2^-8 of itself per element, and the shares are summed in bf16,
    which adds at most 2^-8 of the partial sum per addition.
    """
    whole = bucket.buffer()
    work = dist.all_reduce((whole / size).to(torch.bfloat16), async_op=True)
    return cast("Future[Tensor]", work.get_future().then(lambda done: whole.copy_(done.value()[0])))


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients as the one bucket that torch's hook is given.

    DDP cuts its own buckets anew after the first step of each process, and the hook's memory would not fit them after a
    resume. These follow the optimizer's parameters, so that a resumed run goes on bit for bit.
    """

    parameters: Sequence[Tensor]
    flat: Tensor  # (n,), all gradients in the order of `parameters`

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> Gradients:
        return cls(parameters, torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None]))

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        """Views of the buffer in the shapes of the parameters; the hook takes no scalars."""
        parts = self.flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape or (1,)) for part, p in zip(parts, self.parameters, strict=True)]


class PowerSgd:
    """torch's PowerSGD (Vogels et al. 2019, arXiv 1905.13727), with a memory that survives a restart.

    Each gradient matrix is sent as a product of `rank` columns and `rank` rows; layers that this would make no smaller than
    half are sent as they are, and so are all until `start` steps are taken. What was lost is added to the next gradient
    (`error_feedback`). The method is linear: the result depends on the workers' mean error only, not on each one's own.
    """

    def __init__(self, net: nn.Module, device: torch.device, rank: int, start: int, error_feedback: bool):
        self.device, self.names = device, {p: name for name, p in net.named_parameters()}
        options: dict[str, Any] = {"use_error_feedback": error_feedback, "orthogonalization_epsilon": TINY}
        self.hook_state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=start, **options)

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the compressed mean over workers into the gradients, which must all be there."""
        missing = [self.names[p] for p in parameters if p.grad is None]
        if missing:
            raise PlanError(f"no gradient reached {', '.join(missing)}: leave unused parameters out of the model, "
                            "or PowerSGD out of the engine")  # fmt: skip
        bucket = Gradients.of(parameters)
        powerSGD_hook(self.hook_state, cast(dist.GradBucket, bucket)).wait()
        for p, mean in zip(parameters, bucket.gradients(), strict=True):
            cast(Tensor, p.grad).copy_(mean.view(p.shape))

    def settle(self, worker: Worker) -> None:
        """Make the errors alike on all workers, their mean, which changes no later average."""
        for error in self.hook_state.error_dict.values():
            worker.sum_(error).div_(worker.size)

    def state_dict(self) -> dict[str, Any]:
        state = self.hook_state
        return {"step": state.iter, "error": state.error_dict, "p": state.p_memory_dict, "q": state.q_memory_dict}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        state = self.hook_state
        state.iter = saved["step"]
        state.error_dict, state.p_memory_dict, state.q_memory_dict = (
            {index: tensor.to(self.device, copy=True) for index, tensor in saved[part].items()}
            for part in ("error", "p", "q")
        )
