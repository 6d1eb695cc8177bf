"""Measures gradient noise in training: compares the gradients of all micro-batches of all workers with their mean."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from strategies.contract import PlanError, Worker
from strategies.parts.gradient_noise import from_sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from strategies.net import Net


SMALL = 2**16  # elements of a gradient that is kept as it is
ROW = 2**10  # of those, squared together


class NoiseProbe:
    """Watches the backward passes of one worker, one per micro-batch; `by` is the method that asks, for messages."""

    def __init__(self, net: Net, worker: Worker, by: str):
        self.worker, self.by = worker, by
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.size = 0  # examples of the micro-batch in work
        self.parts = 0  # micro-batches of this step so far
        self.kept = Kept(self.parameters)  # of the micro-batch in work
        self.weighted: Any = 0.0  # sum of |share_i g_i|^2 / size_i, without the micro-batch in work
        self.counted: dict[int, Tensor] = {}  # parts of a global batch of that size, on all workers
        net.register_forward_pre_hook(self._forward)
        for index, p in enumerate(self.parameters):  # what this backward pass adds, before it is averaged over workers
            p.register_hook(functools.partial(self.kept.take, index))

    def _forward(self, net: Any, inputs: tuple[Tensor, ...]) -> None:
        if net.training:
            self._close()
            self.size, self.parts = len(inputs[0]), self.parts + 1

    def _close(self) -> None:
        """The micro-batch in work has ended."""
        if not self.kept.empty:
            self.weighted = self.weighted + self.kept.square() / self.size

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
        self.parts, self.weighted = 0, 0.0
        return *from_sums(weighted, parts, batch, self._mean_square() / workers), parts

    def _mean_square(self) -> Tensor:
        for index, p in enumerate(self.parameters):
            if p.grad is not None:
                self.kept.take(index, p.grad)
        return self.kept.square()


class Kept:
    """What is kept of the gradients of one backward pass, in one run of memory, for one operation to square them all: of a
    small one all, of a large one norms of rows.

    Gradients are copied, not held: autograd hands on what nobody else holds, and copies the rest, each into new memory.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        import torch

        self.large = [p.ndim > 1 and p.numel() > SMALL for p in parameters]
        lengths = [len(p) if large else p.numel() for p, large in zip(parameters, self.large, strict=True)]
        number = functools.reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        whole = -(-sum(lengths) // ROW) * ROW
        flat = torch.zeros(whole, dtype=number, device=parameters[0].device if parameters else None)
        self.rows = flat.view(-1, ROW)  # the last one ends in zeros
        parts = flat[: sum(lengths)].split(lengths)
        self.places = [
            part if large else part.as_strided(p.shape, p.stride())
            for p, large, part in zip(parameters, self.large, parts, strict=True)
        ]
        self.empty = True

    def take(self, index: int, grad: Tensor) -> None:
        """Of the parameter of that number."""
        if grad.requires_grad:
            grad = grad.detach()
        place = self.places[index]
        place.copy_(row_norms(grad, place.dtype) if self.large[index] else grad)
        self.empty = False

    def square(self) -> Tensor:
        """() |g|^2 in float64, of gradients that were not taken 0; then nothing is kept.

        Rows are short enough for numbers of their own precision; the error of a longer sum would grow with its length.
        """
        total = row_norms(self.rows, self.rows.dtype).double().square().sum()
        self.rows.zero_()
        self.empty = True
        return total


def row_norms(grad: Tensor, number: torch.dtype) -> Tensor:
    import torch

    return torch.linalg.vector_norm(grad, dim=tuple(range(1, grad.ndim)), dtype=number)
