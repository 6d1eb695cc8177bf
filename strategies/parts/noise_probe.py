"""Measures gradient noise in training: compares the gradients of all micro-batches of all workers with their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from strategies.contract import PlanError, Worker
from strategies.parts.gradient_noise import from_sums

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


SMALL = 2**16  # elements of a gradient that is kept as it is


class NoiseProbe:
    """Watches the backward passes of one worker, one per micro-batch; `by` is the method that asks, for messages."""

    def __init__(self, net: Net, worker: Worker, by: str):
        self.worker, self.by = worker, by
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.size = 0  # examples of the micro-batch in work
        self.parts = 0  # micro-batches of this step so far
        self.seen: list[Tensor] = []  # what is kept of each gradient of the micro-batch
        self.weighted: Any = 0.0  # sum of |share_i g_i|^2 / size_i, without the micro-batch in work
        self.counted: dict[int, Tensor] = {}  # parts of a global batch of that size, on all workers
        net.register_forward_pre_hook(self._forward)
        for p in self.parameters:
            p.register_hook(self._backward)  # sees what this backward pass adds, before it is averaged over workers

    def _forward(self, net: Any, inputs: tuple[Tensor, ...]) -> None:
        if net.training:
            self._close()
            self.size, self.parts = len(inputs[0]), self.parts + 1

    def _backward(self, grad: Tensor) -> None:
        self.seen.append(kept(grad))

    def _close(self) -> None:
        """The micro-batch in work has ended."""
        if self.seen:
            self.weighted, self.seen = self.weighted + square(self.seen) / self.size, []

    def measure(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """(tr(Sigma), |G|^2, parts): estimates from the parts of this step's global batch, alike on all ranks.

        For `Update.before`, while p.grad holds the mean gradient and no other update has changed it. Raises PlanError if
        the batch has a single part.
        """
        import torch

        trace, signal, parts = self.share(batch)
        trace, signal = self.worker.sum_(torch.stack([trace, signal]))
        return trace, signal, parts

    def share(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `measure`, but this rank's shares of the two, whose sums over ranks they are: nothing is sent for them.

        How many parts there are is asked once for each size of the batch, which changes on all workers in the same step.
        """
        workers = self.worker.size
        if self.parts * workers < 2:
            raise PlanError(
                f"{self.by} compares parts of a batch, but there is one: add workers, or halve base.micro_batch"
            )
        self._close()
        if batch not in self.counted:
            self.counted[batch] = self.worker.sum_(self.weighted.new_tensor(self.parts))
        parts, weighted = self.counted[batch], self.weighted * (batch / workers) ** 2
        mean_square = square([kept(p.grad) for p in self.parameters if p.grad is not None])
        self.parts, self.weighted = 0, 0.0
        return *from_sums(weighted, parts, batch, mean_square / workers), parts


def kept(grad: Tensor) -> Tensor:
    """What is kept of a gradient until all are there. Of a small one all, so that one operation serves many: autograd then
    hands on a copy, for workers to average in place. Of a large one norms of rows, which are short enough for its own
    precision."""
    import torch

    if grad.ndim < 2 or grad.numel() <= SMALL:
        return grad
    return torch.linalg.vector_norm(grad.detach(), dim=tuple(range(1, grad.ndim)))


def square(seen: list[Tensor]) -> Tensor:
    """() |g|^2 in float64, from what is `kept` of all of a network's gradients."""
    import torch

    with torch.no_grad():
        flat = torch.cat([t.reshape(-1) for t in seen])
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        return flat.square().sum().double()  # torch sums in pairs; a dot product's error grows with its length
