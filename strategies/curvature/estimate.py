"""The curvature of a network, estimated while it trains, its work and memory shared out over workers.

A step: sums over the examples of its passes (`watch`) -> reduced to the owner of each layer, who keeps the running factors ->
the owner inverts and sends the inverse to the layer's gradient workers (`refresh`) -> these precondition the gradient and send
it to all others (`precondition`). Each collective carries all that goes from, or to, one worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from strategies.backprop import Gradient, Step
from strategies.contract import Clock, PlanError, Worker
from strategies.curvature.blocks import EigenBlock, block
from strategies.curvature.buckets import Shape, from_sources, pack, to_owners, unpack
from strategies.curvature.capture import Graph, hooked, watched
from strategies.curvature.layers import AnyLayer, served
from strategies.curvature.placement import place
from strategies.curvature.precondition import Options
from strategies.curvature.refresh import change, next_interval
from strategies.net import Net
from strategies.parts.passes import share

COMPILED = "natural_gradient sees no layer at work: torch.compile hides them, leave speed.compile off"


class Curvature:
    """Of the layers of `net` that are served and have no side above `largest`; other parameters are left alone.

    Tensors are named "layer/part". Factors are kept by a layer's owner, inverses by its gradient workers.
    """

    def __init__(self, net: Net, worker: Worker, options: Options):
        self.worker, self.options = worker, options
        dtypes = {torch.promote_types(p.dtype, torch.float32) for p in net.parameters()} or {torch.float32}
        self.like = torch.empty(0, dtype=max(dtypes, key=lambda dtype: dtype.itemsize), device=worker.device)
        every = [block(layer, options.inverse, options.reduce) for layer in served(net)]
        self.blocks = {b.layer.name: b for b in every if b.side <= options.largest}
        self.shapes = {f"{name}/{f}": shape for name, b in self.blocks.items() for f, shape in b.factors.items()}
        self.placement = place([b.cost for b in self.blocks.values()], worker.size, options.gradient_workers)
        self.owner = dict(zip(self.blocks, self.placement.owners, strict=True))
        self.sums: dict[str, Tensor] = {}  # of this worker's examples in the step in work
        self.scales: dict[str, Tensor] = {}  # likewise, for ekfac
        self.kept: dict[str, Tensor] = {}  # means of factors, and their last two fresh values for refresh; inverses
        self.whole: dict[str, Tensor] | None = None  # on rank 0, from `gather` to the next step: what all workers keep
        self.counts: dict[str, int] = {}  # values in a mean; alike on all workers, as is what follows
        self.intervals = dict.fromkeys(self.shapes, (1, 1))  # the last, and the one before
        self.due_at = dict.fromkeys(self.shapes, 0)  # step
        self.stale: list[str] = []  # layers whose factors are newer than the inverse
        self.inputs: list[int] = []  # the shape of an example of which all this is
        self.product = self.like.new_zeros(())  # sum of products of gradients before and after, over all layers
        self.scale = self.like.new_ones(())  # by which `clip` has multiplied
        if options.inverse == "ekfac" and self.placement.columns > 1:
            raise PlanError("natural_gradient: ekfac needs the bases on all workers: leave gradient_workers at 1")
        if self.blocks and net._compiled_call_impl is not None:
            raise PlanError(COMPILED)
        theirs = {id(p) for b in self.blocks.values() for p in b.layer.parameters}
        self.unserved = [name for name, p in net.named_parameters() if p.requires_grad and id(p) not in theirs]

    # -------------------------------------------------------------------------------------------------------- watch

    def due(self, step: int) -> list[str]:
        """The factors that this step makes anew."""
        refresh = self.options.refresh
        if not refresh.factors(step):
            return []
        return [key for key in self.shapes if step >= self.due_at[key] or step < max(refresh.eager, 1)]

    def watch(self, gradient: Gradient, step: Step) -> Tensor:
        """What `gradient` does, seen by layers whose factors are due, and by those with new bases (ekfac)."""
        if step.clock.step == 0:
            self._begin(list(step.batch.x.shape[1:]))
        due = set(self.due(step.clock.step))
        layers = [self.blocks[name].layer for name in self._watching(due)]
        if not layers:
            return gradient(step)
        part = share(step)
        sink = partial(self._see, due, part, step.clock.batch / (step.worker.size * part))
        if self.options.fisher == "empirical":
            with watched(layers, sink):
                return gradient(step)
        graph = Graph(sink)
        with hooked(layers, lambda layer: partial(graph.add, layer)):
            return gradient(dataclasses.replace(step, predict=partial(_sampled, step, graph)))

    def _begin(self, inputs: list[int]) -> None:
        """A phase. What another one has handed on holds for examples of the same shape: a factor's scale depends on how many
        positions its layer has, and a mean over old and new ones would keep the old scale for hundreds of steps."""
        if inputs != self.inputs:
            self.inputs, self.kept, self.counts, self.stale = inputs, {}, {}, []
            self.intervals, self.due_at = dict.fromkeys(self.shapes, (1, 1)), dict.fromkeys(self.shapes, 0)

    def _see(
        self, due: set[str], part: float, scale: float, layer: AnyLayer, xs: list[Tensor], grads: list[Tensor]
    ) -> None:
        """`scale` makes gradients those of single examples, each of which counts for `part` of one."""
        own = self.blocks[layer.name]
        for factor in own.factors:
            key = f"{layer.name}/{factor}"
            if key in due:
                _add(self.sums, key, part * own.statistic(factor, xs, grads, scale))
        if isinstance(own, EigenBlock) and self._scaled(layer.name):
            squares = own.scales(self._inverse(layer.name), xs, grads, scale)
            _add(self.scales, f"{layer.name}/scale", part * squares)

    def _scaled(self, name: str) -> bool:
        """Whether examples correct the eigenvalues of a layer, whose bases are there."""
        return self.options.inverse == "ekfac" and f"{name}/scale" in self.kept

    def _watching(self, due: Collection[str]) -> list[str]:
        """The layers of these factors, and those along whose bases no example has been seen yet."""
        theirs = set(map(_layer, due))
        return [
            name for name in self.blocks if name in theirs or (self._scaled(name) and not self.counts[f"{name}/scale"])
        ]

    def _inverse(self, name: str) -> dict[str, Tensor]:
        return {part: self.kept[f"{name}/{part}"] for part in self.blocks[name].inverses}

    # ------------------------------------------------------------------------------------------------------ refresh

    def refresh(self, clock: Clock) -> None:
        """Factors and inverses that are due, on all workers at once, when the step's last backward pass is done."""
        self.whole = None
        due = self.due(clock.step)
        seen = self._watching(due)
        if due:
            self._fold(due, clock)
        self._rescale(seen, clock)
        if self.options.refresh.inverses(clock.step):
            self._invert(self.options.damping(clock))

    def _fold(self, due: Sequence[str], clock: Clock) -> None:
        """This step's sums into the running means, on the owners."""
        if not self.sums:
            raise PlanError(COMPILED)
        owners = {key: self.owner[_layer(key)] for key in due}
        sums = {key: self.sums[key] if key in self.sums else self._zeros(self.shapes[key]) for key in due}
        self.sums = {}
        summed = to_owners(self.worker, owners, self.shapes, sums)
        fresh = {key: value / clock.batch for key, value in summed.items()}
        if self.options.refresh.tolerance:
            self._adapt(due, fresh, clock)
        for key in due:
            self.counts[key] = self.counts.get(key, 0) + 1
        for key, value in fresh.items():
            self.kept[key] = self._averaged(self.kept.get(key, value), value, self.counts[key])
        self.stale = [name for name in self.blocks if name in {*self.stale, *map(_layer, due)}]

    def _averaged(self, old: Tensor, new: Tensor, count: int) -> Tensor:
        """The mean of the first values, which turns into one that forgets."""
        return old.lerp(new, 1 - min(1 - 1 / count, self.options.memory))

    def _adapt(self, due: Sequence[str], fresh: Mapping[str, Tensor], clock: Clock) -> None:
        """When these factors are due next: the owner of each knows, and all learn."""
        intervals = self.like.new_zeros(len(due))
        for i, key in enumerate(due):
            if key in fresh:
                intervals[i] = self._interval(key, fresh[key])
        for key, interval in zip(due, self.worker.sum_(intervals).tolist(), strict=True):
            self.intervals[key] = (int(interval), self.intervals[key][0])
            self.due_at[key] = clock.step + int(interval)

    def _interval(self, key: str, fresh: Tensor) -> int:
        """Until this factor is due again; its last two values move on."""
        last, before = self.kept.get(f"{key}_last"), self.kept.get(f"{key}_before")
        as_last, as_before = (old is not None and self._near(fresh, old) for old in (last, before))
        self.kept |= {f"{key}_last": fresh} | ({} if last is None else {f"{key}_before": last})
        return next_interval(*self.intervals[key], as_last, as_before)

    def _near(self, new: Tensor, old: Tensor) -> bool:
        return bool(change(new, old) < self.options.refresh.tolerance)

    def _rescale(self, seen: Sequence[str], clock: Clock) -> None:
        """The curvature of these layers along the bases in use, corrected by what this step saw (ekfac)."""
        shapes = {f"{name}/scale": self.blocks[name].inverses["scale"] for name in seen if self._scaled(name)}
        if shapes:
            sums = [self.scales.pop(key) if key in self.scales else self._zeros(shape) for key, shape in shapes.items()]
            flat = self.worker.sum_(pack(sums, list(shapes.values()))) / clock.batch
            for key, value in zip(shapes, unpack(flat, list(shapes.values())), strict=True):
                self.counts[key] += 1
                self.kept[key] = self._averaged(self.kept[key], value, self.counts[key])

    def _invert(self, damping: float) -> None:
        """Stale layers on their owners, then to their gradient workers."""
        mine = {name: self.blocks[name] for name in self.stale if self.owner[name] == self.worker.rank}
        made: dict[str, Tensor] = {}
        for name, own in mine.items():
            inverse = own.invert({f: self.kept[f"{name}/{f}"] for f in own.factors}, damping)
            made |= {f"{name}/{part}": t.contiguous() for part, t in inverse.items()}  # as a checkpoint gives it back
        column = self.placement.column(self.worker.rank)
        shapes = {
            f"{name}/{part}": shape
            for name in self.stale
            if self.owner[name] in column
            for part, shape in self.blocks[name].inverses.items()
        }
        sources = {key: self.owner[_layer(key)] for key in shapes}
        self.kept |= from_sources(self.worker, sources, column, shapes, made, self.like)
        self.counts |= {f"{name}/scale": 0 for name in self.stale}  # the first sample replaces the eigenvalues of K-FAC
        self.stale = []

    def _zeros(self, shape: Shape) -> Tensor:
        return self.like.new_zeros(shape.sizes)

    # ------------------------------------------------------------------------------------------------- precondition

    def precondition(self, clock: Clock) -> None:
        """p.grad <- F^-1 p.grad. A layer without one is left alone; one whose result is not finite keeps its gradient."""
        old = {
            name: b.layer.matrix().to(self.like.dtype)
            for name, b in self.blocks.items()
            if all(p.grad is not None for p in b.layer.parameters)
        }
        self.product = self.like.new_zeros(())
        for name, new in self._preconditioned(old, self.options.damping(clock)).items():
            self.product += (old[name] * new).sum()
            self.blocks[name].layer.write(new)

    def clip(self, bound: float) -> None:
        """Scale what was preconditioned by min(1, sqrt(bound / the sum of products of old and new gradients))."""
        grads = [p.grad for b in self.blocks.values() for p in b.layer.parameters if p.grad is not None]
        self.scale = (bound / self.product).sqrt().nan_to_num(1.0, 1.0).clamp(max=1.0)
        if grads:
            torch._foreach_mul_(grads, self.scale)

    def _preconditioned(self, old: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        rank, columns = self.worker.rank, self.placement.columns
        new = {
            name: _finite(self.blocks[name].apply(self._inverse(name), grad, damping), grad)
            for name, grad in old.items()
            if self.owner[name] % columns == rank % columns
        }
        row = self.placement.row(rank)
        sources = {name: row[self.owner[name] % columns] for name in old}
        shapes = {name: Shape(tuple(grad.shape)) for name, grad in old.items()}
        return from_sources(self.worker, sources, row, shapes, new, self.like)

    # -------------------------------------------------------------------------------------------------------- state

    def gather(self) -> None:
        """What all workers keep onto rank 0, in the memory of its host, for a checkpoint."""
        if self.worker.size == 1:
            return
        everyone = range(self.worker.size)
        whole: dict[str, Tensor] = {}
        for owner in everyone:  # one after the other, so that no worker needs memory for all
            shapes = {key: shape for key, shape in self._everything().items() if self.owner[_layer(key)] == owner}
            sources = dict.fromkeys(shapes, owner)
            found = from_sources(self.worker, sources, everyone, shapes, self.kept, self.like)
            whole |= {key: t.cpu() for key, t in found.items()} if self.worker.rank == 0 else {}
        self.whole = whole if self.worker.rank == 0 else None

    def _everything(self) -> dict[str, Shape]:
        """What is kept anywhere by now."""
        found: dict[str, Shape] = {}
        for key, shape in self.shapes.items():
            suffixes = ["", "_last", "_before"] if self.options.refresh.tolerance else [""]
            found |= {key + suffix: shape for suffix in suffixes[: self.counts.get(key, 0) + 1]}
        for name, b in self.blocks.items():
            if f"{name}/scale" in self.counts:  # it has been inverted
                found |= {f"{name}/{part}": shape for part, shape in b.inverses.items()}
        return found

    def state_dict(self) -> dict[str, Any]:
        """On rank 0, after `gather`, that of all workers: what one worker alone has."""
        tensors = self.kept if self.whole is None else self.whole
        plain = {"counts": self.counts, "intervals": self.intervals, "due_at": self.due_at, "stale": self.stale}
        return {"tensors": tensors, "inputs": self.inputs, **plain}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Of a saved state, this worker's part, also where the state is of another number of workers."""
        self.counts, self.intervals, self.due_at, self.stale = (
            type(saved[name])(saved[name]) for name in ("counts", "intervals", "due_at", "stale")
        )
        self.inputs = list(saved.get("inputs", []))  # earlier versions did not save it
        self.kept = {key: t.to(self.like, copy=True) for key, t in saved["tensors"].items() if self._keeps(key)}

    def _keeps(self, key: str) -> bool:
        layer, _, part = key.rpartition("/")
        owner, rank = self.owner[layer], self.worker.rank
        return rank in self.placement.column(owner) if part in self.blocks[layer].inverses else rank == owner


def _layer(key: str) -> str:
    return key.rpartition("/")[0]


def _add(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _finite(new: Tensor, old: Tensor) -> Tensor:
    return torch.where(new.isfinite().all(), new, old)


def _sampled(step: Step, graph: Graph, x: Tensor) -> Tensor:
    """The logits, as they are; on the way, `graph` sees the gradients of the loss on labels drawn from the model."""
    logits = step.predict(x)
    if logits.requires_grad:
        with torch.autocast(logits.device.type, enabled=False):
            loss = cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)), _labels(logits.detach(), step)
            )
            graph.backward(loss * step.weight)
    return logits


def _labels(logits: Tensor, step: Step) -> Tensor:
    """(n,) classes drawn from the model, alike however a batch is shared out: an example's number goes by its position."""
    clock = step.clock
    uniform = torch.rand(clock.batch, generator=clock.noise("fisher"), dtype=torch.float64)
    chosen = uniform.to(logits.device)[step.batch.position % clock.batch]
    below = logits.double().softmax(1).cumsum(1) < chosen[:, None]
    return below.sum(1).clamp_max(logits.shape[1] - 1)
