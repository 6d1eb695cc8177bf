"""Sees what enters layers and which gradients come back, for as long as it is asked to: without hooks, steps cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from strategies.curvature.layers import AnyLayer

Sink: TypeAlias = Callable[[AnyLayer, list[Tensor], list[Tensor]], None]
"""Takes a layer, the inputs of its calls in one forward pass, and the gradients of the outputs of these calls."""
Hook: TypeAlias = Callable[[Tensor, Tensor], None]
"""Takes the input and the output of one call."""


class Calls:
    """The calls of one layer in a forward pass whose gradients have not all come yet."""

    def __init__(self, layer: AnyLayer, sink: Sink):
        self.layer, self.sink = layer, sink
        self.inputs: list[Tensor] = []
        self.grads: list[Tensor | None] = []

    def add(self, x: Tensor, output: Tensor) -> None:
        """A tensor hook sees the output's gradient even where the output is then changed in place."""
        call = len(self.inputs)
        self.inputs.append(x)
        self.grads.append(None)
        output.register_hook(lambda grad: self.grad(call, grad))

    def grad(self, call: int, grad: Tensor) -> None:
        """All of a layer's calls go to the sink together, as soon as may be, so that memory is free again."""
        self.grads[call] = grad
        if all(g is not None for g in self.grads):
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Calls to which no gradient came count as not made."""
        seen = [(x, g) for x, g in zip(self.inputs, self.grads, strict=True) if g is not None]
        self.inputs, self.grads = [], []
        if seen:
            self.sink(self.layer, [x for x, _ in seen], [g for _, g in seen])


class Graph:
    """The calls of all layers in one forward pass, for the gradients of another loss than the one that is trained on."""

    def __init__(self, sink: Sink):
        self.sink = sink
        self.seen: dict[AnyLayer, list[tuple[Tensor, GradientEdge]]] = {}

    def add(self, layer: AnyLayer, x: Tensor, output: Tensor) -> None:
        self.seen.setdefault(layer, []).append((x, get_gradient_edge(output)))

    def backward(self, loss: Tensor) -> None:
        """A backward pass of `loss` that adds nothing to p.grad and keeps the graph; then the sink gets each layer."""
        edges = [edge for calls in self.seen.values() for _, edge in calls]
        grads = iter(torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True))
        with torch.no_grad():
            for layer, calls in self.seen.items():
                found = [(x, g) for (x, _), g in zip(calls, grads, strict=False) if g is not None]
                if found:
                    self.sink(layer, [x for x, _ in found], [g for _, g in found])
        self.seen = {}


@contextmanager
def hooked(layers: Sequence[AnyLayer], hook: Callable[[AnyLayer], Hook]) -> Iterator[None]:
    """Within, each call of a layer that is to be differentiated goes to the layer's `hook`."""

    def forward(own: Hook, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            own(inputs[0].detach(), output)

    handles = [layer.module.register_forward_hook(partial(forward, hook(layer))) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(layers: Sequence[AnyLayer], sink: Sink) -> Iterator[None]:
    """Within, forward passes and their backward passes are seen: the sink gets each layer in each backward pass."""
    calls = {layer: Calls(layer, sink) for layer in layers}
    with hooked(layers, lambda layer: calls[layer].add):
        yield
    for own in calls.values():
        own.flush()
