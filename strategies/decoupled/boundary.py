"""A network in modules, and the boundaries between them: activations go forward detached, gradients are put in by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from strategies.contract import ModelSpec, PlanError, Worker
from strategies.net import Net


class CutNet(Net):
    """A network cut behind some of its stages; the last module has the pool and the head. It computes what it did uncut.

    ends: behind which stages it is cut. shapes: of an example at each cut. Raises PlanError where it cannot be cut so.
    """

    def __init__(self, whole: Net, ends: Sequence[int], inputs: tuple[int, ...], classes: int):
        super().__init__(whole.stages, whole.pool, whole.head)
        self.inherit_factors(whole)
        self.ends, self.inputs, self.classes = tuple(ends), inputs, classes
        self.shapes = self._shapes()

    def parts(self) -> list[Net]:
        """The modules, made of the network's own layers."""
        bounds = pairwise((0, *self.ends, len(self.stages)))
        parts = [Net(list(self.stages)[begin:end]) for begin, end in bounds]
        parts[-1].pool, parts[-1].head = self.pool, self.head
        for part in parts:
            part.inherit_factors(self)
        return parts

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        shapes, x = [], torch.zeros(1, *self.inputs)
        self.eval()
        with torch.no_grad():
            for part in self.parts()[:-1]:
                x = part(x)
                shapes.append(tuple(x.shape[1:]))
        self.train()
        return tuple(shapes)


def build(inputs: tuple[int, ...], classes: int, model: ModelSpec, cuts: tuple[int, ...] | None) -> CutNet:
    """`cuts` None: behind each stage that has parameters, but the last one."""
    net = model(inputs, classes)
    if type(net).forward is not Net.forward:
        raise PlanError(f"only a row of stages can be cut, but {type(net).__name__} has a forward pass of its own")
    count = len(net.stages)
    if cuts is None:
        cuts = tuple(i for i, stage in enumerate(net.stages, 1) if i < count and [*stage.parameters()])
    most = count if any([*m.parameters()] for m in (net.pool, net.head)) else count - 1
    if any(cut > most for cut in cuts):
        raise PlanError(f"a cut behind stage {max(cuts)} leaves nothing: the network has {count} stages")
    return CutNet(net, cuts, inputs, classes)


def forward(
    parts: Sequence[nn.Module], x: Tensor, worker: Worker, guessed: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """What each of the parts is given, detached and with room for a gradient, and what all but the last make of it.

    With `guessed`, one for each cut, these are given in place of what is made.
    """
    given, made = [x], []
    for cut, part in enumerate(parts[:-1]):
        with worker.autocast():
            made.append(part(given[-1]))
        given.append(boundary(guessed[cut] if guessed else made[-1]))
    return given, made


def boundary(h: Tensor) -> Tensor:
    """`h` for the next module: what it sends back stays in `.grad`."""
    return h.detach().requires_grad_()


def inject(h: Tensor, grad: Tensor, worker: Worker) -> None:
    """A module's backward pass from a gradient of its output; none where nothing in it learns."""
    if h.requires_grad:
        worker.backward(h, grad.to(h.dtype))


def layout(net: nn.Module) -> torch.memory_format:
    """How a network's convolutions like their images to lie in memory: in another layout they are slow, and round otherwise."""
    kernels = [p for p in net.parameters() if p.ndim == 4 and not p.is_contiguous()]
    last = any(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    return torch.channels_last if last else torch.contiguous_format


def laid_out(t: Tensor, format: torch.memory_format) -> Tensor:
    return t.contiguous(memory_format=format) if t.ndim == 4 else t.contiguous()
