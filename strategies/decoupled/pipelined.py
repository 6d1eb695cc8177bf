"""The learner of `pipeline`: backpropagation through modules, of which each works on another micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from strategies.contract import Batch, Clock, Metrics, State, Worker
from strategies.decoupled.learner import Decoupled, DecoupledLive

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.decoupled.roles import Line, Message
    from strategies.net import Net


class Passed(NamedTuple):
    """A micro-batch between a module's forward and backward pass."""

    x: Tensor
    h: Tensor
    back: Tensor  # the gradient of `h`, once its message has been waited for
    message: Message


@dataclass(slots=True, kw_only=True)
class PipelinedLive(DecoupledLive):
    passed: list[Passed] = dataclasses.field(default_factory=list)  # oldest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipelined(Decoupled):
    """All forward passes of a step, then all backward passes; the last module turns each micro-batch round at once."""

    micro_batches: int

    def init(self, net: Net, worker: Worker) -> State:
        state = Decoupled.init(self, net, worker)
        values = {f.name: getattr(state.live, f.name) for f in dataclasses.fields(DecoupledLive)}
        state.live = PipelinedLive(**values)
        return state

    def step(self, state: State, batches: Sequence[Batch], clock: Clock) -> Metrics:
        return Decoupled.step(self, state, [part for batch in batches for part in self._split(batch)], clock)

    def _split(self, batch: Batch) -> Iterator[Batch]:
        parts = [t.tensor_split(min(self.micro_batches, len(batch))) for t in (batch.x, batch.y, batch.position)]
        return (Batch(*part) for part in zip(*parts, strict=True))

    def exchange(self, state: State, batch: Batch, clock: Clock, weight: float) -> Tensor:
        from strategies.decoupled.boundary import boundary, forward, inject

        live: PipelinedLive = state.live
        if live.line:
            number = live.own[0]
            x = boundary(live.line.take()) if number else batch.x
            return self._alone(state, live.line, number, dataclasses.replace(batch, x=x), clock, weight)
        given, made = forward(live.parts, batch.x, live.worker)
        loss = self.top(state, dataclasses.replace(batch, x=given[-1]), clock, weight)
        for h, above in zip(reversed(made), reversed(given), strict=False):
            assert above.grad is not None
            inject(h, above.grad, live.worker)
        return loss

    def _alone(
        self, state: State, line: Line, number: int, batch: Batch, clock: Clock, weight: float
    ) -> Tensor:  # fmt: skip
        """As `exchange`, for the one module of this worker's role; backward passes of those below the last follow."""
        live: PipelinedLive = state.live
        if number == len(live.parts) - 1:
            loss = self.top(state, batch, clock, weight)
            if number:
                line.send(batch.x.grad, number - 1)
            return loss
        with live.worker.autocast():
            h = live.parts[number](batch.x)
        live.passed.append(Passed(batch.x, h, *line.expect(h.shape, number + 1)))
        line.send(h, number + 1)
        return batch.x.new_zeros(())

    def _apply(self, state: State, clock: Clock) -> None:
        from strategies.decoupled.boundary import inject

        live: PipelinedLive = state.live
        for x, h, back, message in live.passed:
            message.wait()
            inject(h, back, live.worker)
            if live.line and live.own[0]:
                live.line.send(x.grad, live.own[0] - 1)
        live.passed = []
        Decoupled._apply(self, state, clock)
