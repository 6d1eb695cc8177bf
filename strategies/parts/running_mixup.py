"""Running mixup: each example is mixed with the virtual example, mixed itself, that stood in its place one batch before.

    x~_t = l_t x_t + (1 - l_t) x~_(t-1),  y~_t likewise,  l_t = max(b, 1 - b), b ~ Beta(alpha, alpha) per example; x~_0 = x_0

The recursion is unrolled: batch i has the weight l_i (1 - l_(i+1)) .. (1 - l_t), l_0 = 1, which at least halves with each step
back. So nothing is kept between steps: old batches are read again from the stream, the same however a batch is shared out,
until the weights left over are negligible; the oldest batch that is read takes these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, ClassVar

from strategies.contract import Batch, Clock, Schedule, Stream
from strategies.parts.batch_maps import soft

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class RunningMixup:
    turn: ClassVar[int] = 0
    alpha: Schedule
    negligible: float = 1e-3  # in each example: below it, older batches are not read; less than a step of 8 bits

    def __call__(self, batch: Batch, clock: Clock, stream: Stream) -> Batch:
        table = weights(dataclasses.replace(clock, rank=0), self.alpha, self.negligible)
        own = table.to(batch.x.device, batch.x.dtype)[:, batch.position % clock.batch]
        read = [batch, *(stream.ahead(-back * clock.batch) for back in range(1, len(table)))]
        x = _sum(own, [part.x for part in read])
        y = _sum(own, [soft(part.y, stream.classes, x) for part in read])
        return dataclasses.replace(batch, x=x, y=y)


def _sum(weights: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Each part (n, ...) times its row of the weights (parts, n), in sum."""
    columns = [w.view(-1, *[1] * (part.ndim - 1)) for w, part in zip(weights, parts, strict=True)]
    total = columns[0] * parts[0]
    for w, part in zip(columns[1:], parts[1:], strict=True):
        total.addcmul_(w, part)
    return total


@lru_cache(maxsize=2)  # of the step's other micro-batches
def weights(clock: Clock, alpha: Schedule, negligible: float) -> Tensor:
    """(batches read, global batch) weights of this batch, the one before, ... in each virtual example; columns sum to 1."""
    import torch

    rows, left = [], torch.ones(clock.batch, dtype=torch.float64)
    for back in count():
        then = clock.step - back
        share = shares(dataclasses.replace(clock, step=then, epoch=then * clock.epochs_per_step), alpha)
        rows.append(left * share)
        left = left * (1 - share)
        if left.max() <= (negligible if then else 0.0):
            rows[-1] += left
            return torch.stack(rows)
    raise AssertionError("unreachable: at step 0, shares are 1")


@lru_cache(maxsize=64)  # of the steps before: as many as weights of 2^-64 would need
def shares(clock: Clock, strength: Schedule) -> Tensor:
    """(global batch,) shares l of a step's own examples in their mixtures, float64, in [1/2, 1]."""
    import torch

    if clock.step == 0:
        return torch.ones(clock.batch, dtype=torch.float64)
    alpha, generator = strength(clock), clock.noise("running mixup")
    both = torch.full((clock.batch, 2), 1 + alpha, dtype=torch.float64)
    uniform = torch.rand(both.shape, generator=generator, dtype=torch.float64)
    logs = torch._standard_gamma(both, generator=generator).log() + uniform.log() / alpha  # of Gamma(alpha) draws
    share = (logs[:, 0] - logs[:, 1]).sigmoid()  # their ratio, which the smallest alpha does not lose
    return torch.maximum(share, 1 - share)
