"""The learner of `delayed_gradient`: several batches are under way at once, each one module further back at each step.

At age a of a batch, which is the number of steps since it was read,

    together: all modules pass it forward at age 0, and module k (from 0) goes backward at age K-1-k;
    apart:    module k passes it forward at age k, and goes backward at age 2(K-1) - k.

Where weights are to be those of the forward pass, a copy of them is kept, and the graph. A checkpoint holds no graphs: after
it, the pass is made again, and draws the same. On workers of their own, modules send on what they have made as soon as they
have: a gradient is used in the next step, and so are activations where forward passes lie apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.contract import Batch, Clock, Metrics, State, Worker, mix
from strategies.decoupled.flights import Ages, Books, Flight
from strategies.decoupled.learner import Decoupled, DecoupledLive

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from strategies.net import Net


@dataclass(slots=True, kw_only=True)
class DelayedLive(DecoupledLive):
    ages: Ages
    books: Books
    format: torch.memory_format  # of images, however they were sent or saved
    flights: list[Flight] = dataclasses.field(default_factory=list)  # oldest first
    fresh: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)  # the batch that is being read

    def hand(self, micro: dict[str, Tensor], name: str, t: Tensor, number: int) -> None:
        """To the module that needs it next."""
        if self.line:
            self.line.send(t, number)
        else:
            micro[name] = t

    def given(self, flight: Flight, number: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Each micro-batch, and what a module is to pass forward of it."""
        from strategies.decoupled.boundary import laid_out

        if self.ages.apart:
            flight.arrive()
        for micro in flight.micros:
            sent_now = self.line if number and not self.ages.apart else None
            yield micro, laid_out(sent_now.take() if sent_now else micro.pop("x"), self.format)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delayed(Decoupled):
    apart: bool  # modules pass forward at different steps, too
    replay: bool  # gradients are of the weights as they are, else as they were in the forward pass
    shrink: float  # factor of what is sent back at each cut

    def init(self, net: Net, worker: Worker) -> State:
        from strategies.decoupled.boundary import layout

        state = Decoupled.init(self, net, worker)
        old: DecoupledLive = state.live
        values = {f.name: getattr(old, f.name) for f in dataclasses.fields(DecoupledLive)}
        ages = Ages(len(old.parts) - 1, self.apart)
        books = Books(old.net, ages, old.worker, old.line, not self.replay)
        state.live = DelayedLive(**values, ages=ages, books=books, format=layout(net))
        state.saved["flights"] = None
        return state

    def step(self, state: State, batches: Sequence[Batch], clock: Clock) -> Metrics:
        live, saved = state.live, state.saved
        if saved["flights"] is not None:
            live.flights = [live.books.own(flight) for flight in saved["flights"]]
            saved["flights"] = None
        return Decoupled.step(self, state, batches, clock)

    def exchange(self, state: State, batch: Batch, clock: Clock, weight: float) -> Tensor:
        """Takes the micro-batch in; `_apply` moves all batches on by a step, and tells the loss."""
        state.live.fresh.append({"x": batch.x, "y": batch.y, "position": batch.position})
        return batch.x.new_zeros(())

    def _apply(self, state: State, clock: Clock) -> None:
        live: DelayedLive = state.live
        seed = mix(clock.seed, "flight", clock.phase, clock.step, live.worker.rank)
        live.flights.append(Flight(clock.batch, seed, live.fresh))
        live.fresh = []
        if all(flight.age != live.ages.back(live.ages.top) for flight in live.flights):
            self._tell_first_loss(state, live.flights[-1], clock)
        if live.line:
            self._ask(live, live.own[0])
        for flight in reversed(live.flights):  # what others wait for first
            for number in live.own:
                self._advance(state, flight, number, clock)
            flight.age += 1
        live.flights = [flight for flight in live.flights if flight.age <= live.ages.back(0)]
        if any(p.grad is not None for p in live.net.parameters()):  # else nothing has come back yet
            Decoupled._apply(self, state, clock)

    def _ask(self, live: DelayedLive, number: int) -> None:
        """For all that neighbours send in this step for later ones. What the first module alone is given goes."""
        ages, shapes = live.ages, live.net.shapes
        if number:
            for micro in live.flights[-1].micros:
                del micro["x"]
        for flight in live.flights:
            if number < ages.top and flight.age == ages.back(number + 1):
                flight.expect(live.line, "grad", shapes[number], number + 1)  # type: ignore[arg-type]
            if number and self.apart and flight.age == ages.forward(number - 1):
                flight.expect(live.line, "x", shapes[number - 1], number - 1)  # type: ignore[arg-type]

    def _advance(self, state: State, flight: Flight, number: int, clock: Clock) -> None:
        """What a module does with a batch at its age."""
        live: DelayedLive = state.live
        if number == live.ages.top:
            if flight.age == live.ages.back(number):
                self._loss(state, flight, clock)
        elif flight.age == live.ages.forward(number):
            self._forward(live, flight, number)
        elif flight.age == live.ages.back(number):
            self._backward(live, flight, number)

    def _forward(self, live: DelayedLive, flight: Flight, number: int) -> None:
        import torch
        from torch.func import functional_call

        from strategies.decoupled.boundary import boundary

        part, passed = live.parts[number], []
        weights = {} if self.replay else {name: _copy(p) for name, p in part.named_parameters()}
        buffers = {name: b.clone() for name, b in part.named_buffers()}  # no graph sees those that others write to
        flight.draw(number, live.worker.device)
        for micro, given in live.given(flight, number):
            micro[f"given {number}"] = given
            x = boundary(given) if number else given
            with torch.set_grad_enabled(not self.replay), live.worker.autocast():
                h = functional_call(part, weights | buffers, (x,))
            live.hand(micro, "x", h.detach(), number + 1)
            passed.append((x, h))
        for name, b in part.named_buffers():
            b.copy_(buffers[name])
        if not self.replay:
            flight.weights[str(number)], flight.passed[number] = weights, passed

    def _loss(self, state: State, flight: Flight, clock: Clock) -> None:
        """The last module's forward and backward pass."""
        live: DelayedLive = state.live
        for micro, given in live.given(flight, live.ages.top):
            x = given.detach().requires_grad_(live.ages.top > 0)
            batch, share = Batch(x, micro["y"], micro["position"]), len(x) / flight.size
            loss = self.top(state, batch, clock, share * live.worker.size)
            if x.grad is not None:
                live.hand(micro, "grad", x.grad, live.ages.top - 1)
            self.tell(state, "loss", loss * share)

    def _backward(self, live: DelayedLive, flight: Flight, number: int) -> None:
        """One module's, from what the one above sent a step ago."""
        from strategies.decoupled.boundary import inject, laid_out

        old = flight.weights.pop(str(number), {})
        passed = flight.passed.pop(number, None) or self._again(live, flight, number, old)
        flight.arrive()
        for micro, (x, h) in zip(flight.micros, passed, strict=True):
            inject(h, self.shrink * laid_out(micro.pop("grad"), live.format), live.worker)
            del micro[f"given {number}"]
            if x.grad is not None:
                live.hand(micro, "grad", x.grad, number - 1)
        for name, p in live.parts[number].named_parameters() if old else ():
            _add(p, old[name].grad)

    def _again(
        self, live: DelayedLive, flight: Flight, number: int, old: dict[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """x, h of each micro-batch by a forward pass that was made before; buffers, such as running statistics, stay."""
        import torch
        from torch.func import functional_call

        from strategies.decoupled.boundary import boundary, laid_out

        part = live.parts[number]
        for name, p in part.named_parameters() if old else ():
            old[name] = torch.empty_like(p).copy_(old[name]).detach().requires_grad_(p.requires_grad)
        buffers = {name: b.clone() for name, b in part.named_buffers()}
        flight.draw(number, live.worker.device)
        for micro in flight.micros:
            x = laid_out(micro[f"given {number}"], live.format)
            x = boundary(x) if number else x
            with live.worker.autocast():
                h = functional_call(part, old | buffers, (x,))
            yield x, h

    def _tell_first_loss(self, state: State, read: Flight, clock: Clock) -> None:
        """While no batch has come to the last module: the loss of the batch that was read, of which nothing learns."""
        import torch
        from torch.func import functional_call

        live: DelayedLive = state.live
        buffers = {name: b.clone() for name, b in live.net.named_buffers()}
        for micro in read.micros if live.ages.top in live.own else ():
            batch = Batch(micro["x"], micro["y"], micro["position"])
            with torch.no_grad(), live.worker.autocast():
                loss = self.objective(lambda x: functional_call(live.net, buffers, (x,)), batch, clock)
            self.tell(state, "loss", loss * (len(batch) / clock.batch))

    def gather(self, state: State) -> None:
        Decoupled.gather(self, state)
        live: DelayedLive = state.live
        for flight in live.flights:
            flight.arrive()
        state.saved["flights"] = [live.books.whole(flight) for flight in live.flights]

    def finish(self, state: State) -> None:
        """Nobody goes backward through what is still under way."""
        live: DelayedLive = state.live
        for flight in live.flights:
            flight.arrive()
        if live.line:
            live.line.close(taken=not self.apart)
        Decoupled.finish(self, state)


def _copy(p: Tensor) -> Tensor:
    return p.detach().clone().requires_grad_(p.requires_grad)


def _add(p: Tensor, grad: Tensor | None) -> None:
    if grad is not None and p.requires_grad:
        p.grad = grad if p.grad is None else p.grad + grad
