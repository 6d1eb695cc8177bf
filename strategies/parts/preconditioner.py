"""What `ng_sgd` does on one worker: sees the rows of each layer, and turns mean gradients into natural ones.

The gradient of an affine layer is Y'X over rows X of inputs and Y of output gradients; with both sides multiplied by fixed
matrices it is P_out Y'X P_in, so that the mean gradient is preconditioned as it is, and rows are needed for sums only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from strategies.contract import Clock, PlanError, State, Worker, mix
from strategies.curvature.capture import watched
from strategies.curvature.layers import AnyLayer, ConvLayer, LinearLayer, NormLayer, served
from strategies.net import Net
from strategies.parts.online_fisher import Factor, Sums, first, merged, of_rows, onto, start
from strategies.parts.patch_layer import PatchAffine, Rows, seen
from strategies.parts.replicas import gathered, scatter_, tensors_in

if TYPE_CHECKING:
    from strategies.ng_sgd import NgSgd

BATCHES = 4  # steps that factors of gradient rows remember, where the recipe says nothing
ALWAYS = 10  # first steps, all of which update factors
NEWEST = 0.9  # largest share of the newest batch in a factor
WIDEST = 4096  # columns of a side, up to which X'X of the first batch is held whole

COMPILED = "ng_sgd sees no layer at work: torch.compile hides them, leave speed.compile off"

Affine: TypeAlias = LinearLayer | ConvLayer
Fields: TypeAlias = dict[str, Any]
"""A factor as it is saved: q, d, rho, and how many batches it has met."""


@dataclass(slots=True)
class Tally:
    """Sums over the rows of one side of a layer in this step, so far."""

    head: Tensor  # (3,) float64: samples, rows, their square
    products: Tensor  # float64, see `Sums`

    def add(self, rows: Tensor, samples: float, probe: Tensor | None) -> None:
        square, products = of_rows(rows, probe, self.products.ndim == 2)
        self.head += torch.stack([square.new_tensor(samples), square.new_tensor(len(rows)), square])
        self.products += products

    def sums(self, scale: float) -> Sums:
        """Of the rows, each multiplied by `scale`."""
        return Sums(self.head[1], self.head[2] * scale**2, self.products * scale**2)


class Preconditioner:
    """Keeps its factors in `state.saved`, by layer and side: "in" for inputs, "out" for output gradients.

    Each counts the batches that it has met, so that one that is made anew alone begins like any other.
    """

    def __init__(self, net: Net, worker: Worker, options: NgSgd, state: State):
        self.worker, self.options, self.state = worker, options, state
        self.layers = [layer for layer in served(net) if not isinstance(layer, NormLayer)]
        with_rows = [layer for layer in self.layers if has_rows(layer)]
        self.sides = [side_of(layer, end) for layer in with_rows for end in ("in", "out")]
        self.tallies: dict[str, Tally] = {}
        self.share = 1.0  # of the pass in work among all passes over its examples
        state.saved |= {"steps": 0, "factors": dict(self._starts())}
        if with_rows and net._compiled_call_impl is not None:
            raise PlanError(COMPILED)
        self.watching = ExitStack()
        self.watching.enter_context(watched(with_rows, self._see))

    def _starts(self) -> Iterator[tuple[str, Fields]]:
        for layer in self.layers:
            weight = layer.weight.detach()
            out, width = layer.join([p.detach() for p in layer.parameters]).shape[1:]
            yield side_of(layer, "in"), _fields(start(width, self._rank_in(layer), weight), 0)
            yield side_of(layer, "out"), _fields(start(out, self.options.rank_out, weight), 0)

    def _rank_in(self, layer: Affine) -> int:
        """Rows of a gradient have no less than its columns, as in Kaldi: they are few, and cost little."""
        rank_in, rank_out = self.options.rank_in, self.options.rank_out
        return rank_in if has_rows(layer) or not rank_in else max(rank_in, rank_out)

    # ------------------------------------------------------------------------------------------------------- rows

    def _fields(self, side: str) -> Fields:
        return self.state.saved["factors"][side]

    def _due(self, side: str) -> bool:
        """Whether this batch updates the factor."""
        batches = self._fields(side)["batches"]
        return batches < ALWAYS or (batches + 1 - ALWAYS) % self.options.update_period == 0

    def _see(self, layer: AnyLayer, inputs: list[Tensor], grads: list[Tensor]) -> None:
        assert not isinstance(layer, NormLayer)
        for x, grad in zip(inputs, grads, strict=True):
            for rows in rows_of(layer, x, grad, mix("positions", layer.name, self.state.saved["steps"])):
                samples = self.share * rows.samples
                self._add(side_of(layer, "in"), rows.inputs.to(layer.weight.dtype), samples)
                self._add(side_of(layer, "out"), rows.outputs.to(layer.weight.dtype) / self.share, samples)

    def _add(self, side: str, rows: Tensor, samples: float) -> None:
        self._tally(side).add(rows, samples, self._probe(side))

    def _probe(self, side: str) -> Tensor | None:
        """What products are taken with; None: X'X is wanted whole, since a factor's first updates all use one batch."""
        fields = self._fields(side)
        q = fields["q"]
        return q if fields["batches"] or q.shape[1] > WIDEST or not len(q) else None

    def _tally(self, side: str) -> Tally:
        if side not in self.tallies:
            fields = self._fields(side)
            rank, width = fields["q"].shape
            shape = (width, width) if self._probe(side) is None else (rank, width) if self._due(side) else (rank,)
            self.tallies[side] = Tally(fields["d"].new_zeros(3), fields["d"].new_zeros(shape))
        return self.tallies[side]

    def _collect(self) -> dict[str, Tally]:
        """Of all workers, by one collective; sides that no row was seen of have zeros."""
        found = {side: self._tally(side) for side in self.sides}
        self.tallies = {}
        tensors = [t for tally in found.values() for t in (tally.head, tally.products)]
        if tensors:
            total = self.worker.sum_(torch.cat([t.flatten() for t in tensors]))
            for t, part in zip(tensors, total.split([t.numel() for t in tensors]), strict=True):
                t.copy_(part.view_as(t))
        return found

    # -------------------------------------------------------------------------------------------------- gradients

    @torch.no_grad()
    def step(self, clock: Clock) -> None:
        """Preconditions p.grad, the mean over the global batch, and updates the factors where that is due."""
        found = self._collect()
        for layer in self.layers:
            if all(p.grad is not None for p in layer.parameters):
                self._precondition(layer, found, clock)
        self.state.saved["steps"] += 1

    def _precondition(self, layer: Affine, found: dict[str, Tally], clock: Clock) -> None:
        """Each side by its factor as it was before this batch, with its rows' norm restored."""
        matrix = layer.matrix()
        share = clock.batch / self.worker.size  # what gradients lack, at a worker, to be those of single examples
        matrix, of_inputs = self._side(side_of(layer, "in"), matrix, found, clock.batch, 1.0)
        turned, of_outputs = self._side(side_of(layer, "out"), matrix.mT, found, clock.batch, share)
        layer.write(turned.mT * (of_inputs * of_outputs).to(matrix.dtype))

    def _side(
        self, side: str, matrix: Tensor, found: dict[str, Tally], batch: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(preconditioned matrix (..., d), () the scale that restores the norm of rows)."""
        tally = found.get(side)
        sums = tally.sums(scale) if tally else self._of_gradient(side, matrix * batch)
        eta = self._eta(tally.head[0] if tally else None)
        fields, alpha = self._fields(side), self.options.alpha
        factor, batches = _factor(fields), fields["batches"]
        if self._probe(side) is None:
            factor = first(factor, sums, eta)
            sums = onto(factor, sums)
        elif not batches:  # too wide a side: its factor knows nothing yet
            alpha = inf
        result = factor.reduce(matrix, alpha), factor.scale(sums, alpha)
        new = factor.updated(sums, eta) if self._due(side) else factor
        self.state.saved["factors"][side] = _fields(new, batches + 1)
        return result

    def _of_gradient(self, side: str, matrix: Tensor) -> Sums:
        """Of a convolution that is no affine layer: the rows of its gradient."""
        rows = matrix.flatten(0, 1)
        square, products = of_rows(rows, self._probe(side), self._due(side))
        return Sums(square.new_tensor(len(rows)).double(), square.double(), products.double())

    def _eta(self, samples: Tensor | None) -> float | Tensor:
        """The share of this batch in the factor that it updates. Rows of a gradient are no samples."""
        batches = self.options.history_batches
        if batches or samples is None:
            return min(1 / (batches or BATCHES), NEWEST)
        return (1 - torch.exp(-samples / self.options.history_samples)).clamp(max=NEWEST)

    # ---------------------------------------------------------------------------------------------------- workers

    @torch.no_grad()
    def merge(self, worker: Worker) -> None:
        """Each factor becomes the one nearest to the mean over workers, alike on all."""
        own = self.state.saved["factors"]
        tables = gathered(list(tensors_in(own)), worker)
        copies = []
        for rank in range(worker.size):
            copies.append(copy.deepcopy(own))
            scatter_(tables, list(tensors_in(copies[-1])), rank)
        for side, fields in own.items():
            own[side] = _fields(merged([_factor(one[side]) for one in copies]), fields["batches"])


def side_of(layer: Affine, end: str) -> str:
    return f"{layer.name}.{end}"


def _fields(factor: Factor, batches: int) -> Fields:
    return {"q": factor.q, "d": factor.d, "rho": factor.rho, "batches": batches}


def _factor(fields: Fields) -> Factor:
    return Factor(fields["q"], fields["d"], fields["rho"])


def has_rows(layer: Affine) -> bool:
    """Whether a layer is affine: linear, or by patches."""
    return isinstance(layer, LinearLayer) or isinstance(layer.module, PatchAffine)


def rows_of(layer: Affine, x: Tensor, grad: Tensor, seed: int) -> Iterator[Rows]:
    """Of one call. An example counts once, however many positions it has; see `patch_affine` for patches."""
    if isinstance(layer, ConvLayer):
        yield from seen(layer, x, grad, seed)
    else:
        yield Rows(layer.inputs(x).flatten(0, 2), layer.outputs(grad).flatten(0, 2), len(x))
