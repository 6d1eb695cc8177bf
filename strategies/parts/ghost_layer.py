"""The batch norm layer of `ghost_batch_norm`, and its place in a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from strategies.contract import PlanError
from strategies.net import Net


class GhostBatchNorm(_BatchNorm):
    """Batch norm over parts of at most `size` examples, which differ by one at most; parameters and buffers as `old`.

    Running statistics follow each part in order, or wait in `sums` for whoever calls `absorb`.
    """

    sums: Tensor

    def __init__(self, old: _BatchNorm, size: int, in_order: bool):
        super().__init__(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
        self.load_state_dict(old.state_dict())
        for own, taken in zip(self.parameters(), old.parameters(), strict=True):
            own.requires_grad_(taken.requires_grad)
        self.size, self.in_order = size, in_order
        features = 0 if self.running_mean is None else self.num_features
        self.register_buffer("sums", torch.zeros(2 * features + 1), persistent=False)  # of means, of variances; parts

    def _check_input_dim(self, x: Tensor) -> None:
        """The layer stands where its predecessor stood."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return torch.cat([self._normalise(part) for part in x.tensor_split(-(-len(x) // self.size))])

    def _normalise(self, part: Tensor) -> Tensor:
        if self.running_mean is None or self.running_var is None:
            return F.batch_norm(part, None, None, self.weight, self.bias, True, 0.0, self.eps)
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        out = F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)  # 1.0: this part's own
        self.sums += torch.cat([mean, variance, torch.ones_like(mean[:1])])
        if self.in_order:
            self.absorb(self.sums)
        return out

    def forget(self) -> None:
        """No parts seen since the running statistics moved."""
        self.sums.zero_()

    def absorb(self, sums: Tensor) -> None:
        """One step of the running statistics towards the mean over parts; none where no part was seen."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        step = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        means, parts = sums[:-1] / sums[-1].clamp(min=1), sums[-1]
        for running, mean in zip((self.running_mean, self.running_var), means.chunk(2), strict=True):
            running.lerp_(mean, parts.clamp(max=1) * step)
        self.forget()


def ghosts(net: nn.Module) -> list[GhostBatchNorm]:
    return [module for module in net.modules() if isinstance(module, GhostBatchNorm)]


def split(net: Net, size: int, in_order: bool) -> Net:
    """The net with every batch norm split. Raises PlanError if it has none."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                setattr(parent, name, GhostBatchNorm(child, size, in_order))
    if not ghosts(net):
        raise PlanError(
            "ghost_batch_norm splits batch norms, but the network has none: leave it out, or choose another model"
        )
    return net
