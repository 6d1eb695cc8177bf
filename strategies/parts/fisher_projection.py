"""What `fop` does on one worker: the difference of two halves' gradients, and each layer's projection of it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from strategies.backprop import Step
from strategies.contract import Batch, Clock, PlanError, Worker
from strategies.curvature import inverses
from strategies.curvature.blocks import Block, EigenBlock, KroneckerBlock, Named
from strategies.curvature.estimate import Curvature
from strategies.curvature.layers import AnyLayer, NormLayer

NEGLIGIBLE = 1e-8  # d'.F^-1 d' over g.F^-1 g from which on d' counts: halves that are alike differ by rounding alone
TINY = 1e-30  # so that a gradient of zeros is divided by no zero


class Halves:
    """Sums what the passes of the first half of a batch add to the gradients of the layers that `curvature` serves."""

    def __init__(self, worker: Worker, curvature: Curvature):
        self.worker, self.curvature = worker, curvature
        self.parameters = [p for b in curvature.blocks.values() for p in b.layer.parameters]
        self.sums = [torch.zeros_like(p) for p in self.parameters]
        self.weight = 0.0  # of the passes in the sums
        self.batch: Batch | None = None  # the micro-batch in work
        self.parts = 0  # micro-batches so far
        for p, total in zip(self.parameters, self.sums, strict=True):
            p.register_hook(partial(self._add, total))  # before gradients are averaged over workers

    @property
    def first(self) -> bool:
        """Whether the micro-batch in work is of the first half."""
        return (self.worker.rank if self.worker.size > 1 else self.parts - 1) % 2 == 0

    def meet(self, step: Step) -> None:
        """Before each pass; a micro-batch may take several."""
        if step.batch is not self.batch:
            self.batch, self.parts = step.batch, self.parts + 1
        if self.first:
            self.weight += step.weight

    def _add(self, total: Tensor, grad: Tensor) -> None:
        if self.first:
            total += grad

    def difference(self) -> dict[int, Tensor]:
        """g1 - g2 by the id of the parameter, while p.grad is the mean gradient of all; starts anew."""
        if self.worker.size * self.parts < 2:
            raise PlanError(
                "fop compares two halves of a batch, but there is one part: add workers, or halve base.micro_batch"
            )
        weight = self.sums[0].new_tensor([self.weight])
        *sums, weight = self._summed([*self.sums, weight])
        rest = 1 - weight / self.worker.size  # the second half's share of the batch
        found = {
            id(p): (s / weight - p.grad) / rest
            for p, s in zip(self.parameters, sums, strict=True)
            if p.grad is not None
        }
        for total in self.sums:
            total.zero_()
        self.weight, self.batch, self.parts = 0.0, None, 0
        return found

    def _summed(self, tensors: list[Tensor]) -> list[Tensor]:
        """Over workers, by one collective."""
        flat = self.worker.sum_(torch.cat([t.reshape(-1) for t in tensors]))
        return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]

    @torch.no_grad()
    def project(self, clock: Clock, strength: float, layer_steps: bool) -> None:
        """p.grad <- eta (g + beta d'). The owner of a layer works out what of g and what of g1 - g2 that is."""
        if not self.parameters:
            return
        curvature, difference = self.curvature, self.difference()
        damping = curvature.options.damping(clock)
        blocks = [b for b in curvature.blocks.values() if all(id(p) in difference for p in b.layer.parameters)]
        shares = torch.zeros(len(blocks), 2, dtype=torch.float64, device=self.worker.device)
        for i, own in enumerate(blocks):
            name = own.layer.name
            if curvature.owner[name] == self.worker.rank:
                inverse = {part: curvature.kept[f"{name}/{part}"] for part in own.inverses}
                g, d = (t.to(curvature.like.dtype) for t in (own.layer.matrix(), _matrix(own.layer, difference)))
                shares[i] = combination(own, inverse, g, d, damping, strength, layer_steps)
        for own, (of_mean, of_difference) in zip(blocks, self.worker.sum_(shares), strict=True):
            for p in own.layer.parameters:
                p.grad.mul_(of_mean).add_(difference[id(p)] * of_difference)  # type: ignore[union-attr]


def _matrix(layer: AnyLayer, tensors: dict[int, Tensor]) -> Tensor:
    """As `layer.matrix` has p.grad."""
    own = [tensors[id(p)] for p in layer.parameters]
    return torch.stack(own, -1) if isinstance(layer, NormLayer) else layer.join(own)


def combination(
    own: Block, inverse: Named, g: Tensor, d: Tensor, damping: float, strength: float = 1.0, layer_steps: bool = True
) -> Tensor:
    """(2,) float64 shares of g and of d in eta (g + beta d'); 1 and 0 where the inverse is not finite."""
    ahead = times_fisher(own, inverse, g, damping)
    s = _dot(d, ahead) / _dot(g, ahead).clamp_min(TINY)
    rest = d - s.to(d.dtype) * g
    natural, turned = (own.apply(inverse, t, damping) for t in (g, rest))
    along, own_length = _dot(g, turned), _dot(rest, turned)
    beta = strength * along / (own_length + NEGLIGIBLE * _dot(g, natural)).clamp_min(TINY)
    gain = _dot(g, natural) + beta * along
    length = gain + beta * along + beta**2 * own_length
    eta = gain / length if layer_steps else torch.ones_like(gain)
    found = torch.stack([eta * (1 - beta * s), eta * beta])
    return torch.where(found.isfinite().all(), found, found.new_tensor([1.0, 0.0]))


def times_fisher(own: Block, inverse: Named, grad: Tensor, damping: float) -> Tensor:
    """F grad, for the F whose inverse `own.apply` takes."""
    if isinstance(own, EigenBlock):
        curvature = inverse["scale"] + damping
        return inverses.by_basis(grad, inverse["a_basis"], inverse["g_basis"], 1 / curvature, 0.0)
    if isinstance(own, KroneckerBlock):
        return _solve(inverse["a_inverse"], _solve(inverse["g_inverse"], grad).mT).mT
    return _solve(inverse["f_inverse"], grad[..., None])[..., 0]


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right, without waiting for the device to tell of errors; not finite where there is no such thing."""
    return torch.linalg.solve_ex(matrix, right)[0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum()
