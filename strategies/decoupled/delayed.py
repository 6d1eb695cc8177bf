"""The learner of `delayed_gradient`: several batches are under way at once, each one module further back at each step.

A sequential simulation of K modules that work at the same time, with their staleness: at age a of a batch, which is the number
of steps since it was read,

    together: all modules pass it forward at age 0, and module k (from 0) goes backward at age K-1-k;
    apart:    module k passes it forward at age k, and goes backward at age 2(K-1) - k.

Where weights are to be those of the forward pass, they are kept, and the pass is made again at the time of the backward pass,
so that a checkpoint holds no graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.contract import Batch, Clock, Metrics, State, Worker
from strategies.decoupled import shares
from strategies.decoupled.learner import Decoupled, DecoupledLive

if TYPE_CHECKING:
    from torch import Tensor, nn

    from strategies.net import Net


@dataclass(slots=True)
class Flight:
    """A batch under way, this worker's share of it. A micro-batch has x (as the next module forward is given it), y,
    position, `given k` for each module that has yet to go backward, and grad, of what the last of these is to send on."""

    size: int  # examples of the global batch
    micros: list[dict[str, Tensor]]
    age: int = 0
    weights: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)  # by module, as at its forward pass


@dataclass(slots=True, kw_only=True)
class DelayedLive(DecoupledLive):
    flights: list[Flight] = dataclasses.field(default_factory=list)
    fresh: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)  # the batch that is being read


@dataclass(frozen=True, slots=True, kw_only=True)
class Delayed(Decoupled):
    apart: bool  # modules pass forward at different steps, too
    replay: bool  # gradients are of the weights as they are, else as they were in the forward pass
    shrink: float  # factor of what is sent back at each cut

    def init(self, net: Net, worker: Worker) -> State:
        state = Decoupled.init(self, net, worker)
        values = {f.name: getattr(state.live, f.name) for f in dataclasses.fields(DecoupledLive)}
        state.live = DelayedLive(**values)
        state.saved["flights"] = None
        return state

    def step(self, state: State, batches: Sequence[Batch], clock: Clock) -> Metrics:
        live, saved = state.live, state.saved
        if saved["flights"] is not None:
            live.flights = [Flight(**f | {"micros": shares.own(f["micros"], live.worker)}) for f in saved["flights"]]
            saved["flights"] = None
        return Decoupled.step(self, state, batches, clock)

    def exchange(self, state: State, batch: Batch, clock: Clock, weight: float) -> Tensor:
        """Takes the micro-batch in; `_apply` moves all batches on by a step, and tells the loss."""
        state.live.fresh.append({"x": batch.x.contiguous(), "y": batch.y, "position": batch.position})
        return batch.x.new_zeros(())

    def _apply(self, state: State, clock: Clock) -> None:
        live: DelayedLive = state.live
        live.flights.append(Flight(clock.batch, live.fresh))
        live.fresh = []
        for flight in live.flights:
            self._advance(state, flight, clock)
        if "loss" not in live.told:
            self._tell_first_loss(state, clock)
        last = 2 * (len(live.parts) - 1) if self.apart else len(live.parts) - 1
        live.flights = [flight for flight in live.flights if flight.age <= last]
        if any(p.grad is not None for p in live.net.parameters()):  # else nothing has come to the last module yet
            Decoupled._apply(self, state, clock)

    def _advance(self, state: State, flight: Flight, clock: Clock) -> None:
        """What modules do with a batch at its age."""
        live: DelayedLive = state.live
        top, age = len(live.parts) - 1, flight.age
        forward = range(age, min(age + 1, top)) if self.apart else range(top if age == 0 else 0)
        back = age - top if self.apart else age  # how many modules lie above the one that goes backward
        for number in forward:
            self._forward(live, flight, number)
        if back == 0:
            self._loss(state, flight, clock)
        elif back > 0:
            self._backward(live, flight, top - back)
        flight.age += 1

    def _forward(self, live: DelayedLive, flight: Flight, number: int) -> None:
        import torch

        part = live.parts[number]
        if not self.replay:
            flight.weights[str(number)] = {name: _copy(p) for name, p in part.named_parameters()}
        for micro in flight.micros:
            micro[f"given {number}"] = micro["x"]
            with torch.no_grad(), live.worker.autocast():
                micro["x"] = part(micro["x"]).contiguous()  # a checkpoint keeps no other layout

    def _loss(self, state: State, flight: Flight, clock: Clock) -> None:
        """The last module's forward and backward pass."""
        live: DelayedLive = state.live
        for micro in flight.micros:
            x = micro.pop("x").detach().requires_grad_(len(live.parts) > 1)
            batch, share = Batch(x, micro["y"], micro["position"]), len(x) / flight.size
            with live.worker.autocast():
                loss = self.objective(live.parts[-1], batch, clock)
            live.worker.backward(loss * (share * live.worker.size))
            _keep(micro, x.grad)
            self.tell(state, "loss", loss.detach() * share)

    def _backward(self, live: DelayedLive, flight: Flight, number: int) -> None:
        """One module's, from what the one above sent a step ago."""
        from torch.func import functional_call

        from strategies.decoupled.boundary import boundary, inject

        part, old = live.parts[number], flight.weights.pop(str(number), None)
        used: dict[str, Tensor] = (
            dict(part.named_parameters()) if old is None else {n: _leaf(t, live) for n, t in old.items()}
        )
        for micro in flight.micros:
            x = boundary(micro.pop(f"given {number}"))
            with quiet(part):
                with live.worker.autocast():
                    h = functional_call(part, used, (x,))
                inject(h, self.shrink * micro.pop("grad"), live.worker)
            _keep(micro, x.grad)
        if old is not None:
            for name, p in part.named_parameters():
                _add(p, used[name].grad)

    def _tell_first_loss(self, state: State, clock: Clock) -> None:
        """While no batch has come to the last module: the loss of the batch that was read, of which nothing learns."""
        import torch

        live: DelayedLive = state.live
        for micro in live.flights[-1].micros:
            x = micro["given 0"]
            with torch.no_grad(), live.worker.autocast(), quiet(live.net):
                loss = self.objective(live.net, Batch(x, micro["y"], micro["position"]), clock)
            self.tell(state, "loss", loss * (len(x) / clock.batch))

    def gather(self, state: State) -> None:
        Decoupled.gather(self, state)
        live: DelayedLive = state.live
        state.saved["flights"] = [
            {"size": f.size, "age": f.age, "weights": f.weights, "micros": shares.whole(f.micros, f.size, live.worker)}
            for f in live.flights
        ]


def _keep(micro: dict[str, Tensor], grad: Tensor | None) -> None:
    if grad is not None:
        micro["grad"] = grad.contiguous()


def _copy(p: Tensor) -> Tensor:
    import torch

    return p.detach().clone(memory_format=torch.contiguous_format)


def _leaf(t: Tensor, live: DelayedLive) -> Tensor:
    return t.to(live.worker.device).detach().requires_grad_()


def _add(p: Tensor, grad: Tensor | None) -> None:
    if grad is not None and p.requires_grad:
        p.grad = grad if p.grad is None else p.grad + grad


@contextmanager
def quiet(part: nn.Module) -> Iterator[None]:
    """Within, a pass that was made before is made again: buffers, such as running statistics, stay as they are."""
    before = [b.clone() for b in part.buffers()]
    yield
    for b, old in zip(part.buffers(), before, strict=True):
        b.copy_(old)
