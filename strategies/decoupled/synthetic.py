"""The learner of `synthetic_gradient`: modules move by guessed gradients of the loss by their outputs.

The reference implementation: all modules of one minibatch one after the other on each worker, in the order of the equations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from strategies.contract import Batch, Clock, Metrics, State, Worker
from strategies.decoupled.learner import Decoupled, DecoupledLive
from strategies.decoupled.waiting import Arrival, Arrive, Pair, Waiting, at_once
from strategies.optimizers import AdamW
from strategies.parts.batch_norm import reestimate, tracking

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from strategies.decoupled.boundary import CutNet
    from strategies.net import Net

ESTIMATED = 1024  # training examples, at most, over which batch norms' statistics are estimated anew
Kind: TypeAlias = Literal["deep", "linear", "affine", "low_rank", "pooled"]


@dataclass(frozen=True, slots=True)
class Guess:
    """How gradients are guessed."""

    kind: Kind = "linear"
    label: bool = True
    hidden: int | None = None
    rate: float | None = 1e-3  # of Adam; None: the network's optimizer and rate


@dataclass(frozen=True, slots=True)
class Share:
    """Lambda of BP(lambda): the share of the gradient sent back in what a module moves by; linear in epochs, then constant."""

    start: float
    end: float
    epochs: float

    def __call__(self, clock: Clock) -> float:
        risen = min(1.0, clock.epoch / self.epochs) if self.epochs else 1.0
        return self.start + (self.end - self.start) * risen


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic(Decoupled):
    """At each cut, with T the gradient that comes back from the module above and M the synthesiser's guess of it:
    the module below moves by lambda T + (1 - lambda) M, and M learns to be T, `queue` batches later.

    Both are gradients of the loss summed over examples, so that neither depends on the size of the batch.
    """

    guess: Guess
    share: Share
    queue: int
    guess_inputs: bool  # modules are given guesses of their inputs, too

    def helpers(self, net: CutNet) -> list[Any]:
        """Of gradients, for each cut; then, where there are any, of inputs."""
        from strategies.decoupled.synthesisers import input_synthesiser, synthesiser

        ahead = [input_synthesiser(net.inputs, shape) for shape in net.shapes if self.guess_inputs]
        return [*(synthesiser(self.guess, shape, net.classes) for shape in net.shapes), *ahead]

    def helper_optimizer(self, helper: Net) -> Optimizer:
        return self.optimizer(helper) if self.guess.rate is None else AdamW(weight_decay=0.0)(helper)

    def helper_rate(self, clock: Clock) -> float:
        return self.rate(clock) if self.guess.rate is None else self.guess.rate

    def init(self, net: Net, worker: Worker) -> State:
        state = Decoupled.init(self, net, worker)
        old: DecoupledLive = state.live
        values = {f.name: getattr(old, f.name) for f in dataclasses.fields(DecoupledLive)}
        held, everyone = [n for n in old.own if n < len(old.parts) - 1], old.line.worker if old.line else None
        state.live = SyntheticLive(**values, waiting=Waiting(old.worker, len(old.parts) - 1, held, everyone))
        state.saved["waiting"] = None
        return state

    def step(self, state: State, batches: Sequence[Batch], clock: Clock) -> Metrics:
        if state.saved["waiting"] is not None:
            state.live.waiting.restore(state.saved["waiting"])
            state.saved["waiting"] = None
        return Decoupled.step(self, state, batches, clock)

    def exchange(self, state: State, batch: Batch, clock: Clock, weight: float) -> Tensor:
        import torch

        from strategies.decoupled.boundary import forward

        live: SyntheticLive = state.live
        if live.line:
            return self._alone(state, batch, clock, weight)
        unit = live.worker.size / clock.batch
        guessed = [live.guess_input(cut, batch.x) for cut in range(len(live.parts) - 1) if self.guess_inputs]
        given, made = forward(live.parts, batch.x, live.worker, guessed)
        loss = self.top(state, dataclasses.replace(batch, x=given[-1]), clock, weight)
        for cut in reversed(range(len(made))):
            back = given[cut + 1].grad
            assert back is not None
            target = back.to(torch.promote_types(back.dtype, torch.float32)) / unit
            pair = Pair(made[cut].detach(), batch.y, target)
            guess = self._move(state, cut, made[cut], pair, back, clock)
            self._tell_cosine(state, cut, guess, target, clock)
            self._learn(state, cut, guess, pair, at_once, clock)
        for guess, true in zip(guessed, made, strict=False):
            live.learn(guess, true.detach(), unit)
        return loss

    def _alone(self, state: State, batch: Batch, clock: Clock, weight: float) -> Tensor:
        """As `exchange`, for the one module of this worker's role."""
        from strategies.decoupled.boundary import boundary

        live: SyntheticLive = state.live
        line, number = live.line, live.own[0]
        assert line
        self._stand_in(live, number, batch)
        x = boundary(line.take()) if number else batch.x
        if number == len(live.parts) - 1:
            loss = self.top(state, dataclasses.replace(batch, x=x), clock, weight)
            if number:
                line.send(x.grad, number - 1)
            return loss
        self._middle(state, x, batch.y, clock)
        return batch.x.new_zeros(())

    def _middle(self, state: State, x: Tensor, y: Tensor, clock: Clock) -> None:
        """A module that is not the last: what it makes goes up before it moves, and its gradient down before it learns."""
        live: SyntheticLive = state.live
        line, number, unit = live.line, live.own[0], live.worker.size / clock.batch
        assert line
        with live.worker.autocast():
            h = live.parts[number](x)
        back, pending = line.expect(h.shape, number + 1)
        line.send(h, number + 1)
        pair = Pair(h.detach().to(back.dtype), y, back)

        def then() -> None:
            back.div_(unit)
            self._tell_cosine(state, number, guess, back, clock)

        arrival = Arrival(pending, then)
        if self.share(clock):
            arrival.wait()
        guess = self._move(state, number, h, pair, back, clock)
        if number:
            line.send(x.grad, number - 1)
        self._learn(state, number, guess, pair, arrival, clock)

    def _stand_in(self, live: SyntheticLive, number: int, batch: Batch) -> None:
        """For what the workers of other roles keep waiting, so that a checkpoint has the same form on all. No memory."""
        for cut, shape in enumerate(live.net.shapes if self.queue else ()):
            if cut != number:
                nothing = batch.x.new_zeros(()).expand(len(batch), *shape)
                live.waiting.add(cut, Pair(nothing, batch.y, nothing))

    def _move(self, state: State, cut: int, made: Tensor, pair: Pair, back: Tensor, clock: Clock) -> Tensor:
        """The backward pass of the module below a cut, of whose output `back` is the gradient; -> the guess."""
        import torch

        from strategies.decoupled.boundary import inject

        live: SyntheticLive = state.live
        unit, share = live.worker.size / clock.batch, self.share(clock)
        with torch.set_grad_enabled(not self.queue):
            guess = live.guess(cut, pair)
        guessed = (1 - share) * unit * guess.detach()
        inject(made, share * back + guessed if share else guessed, live.worker)
        return guess

    def _learn(self, state: State, cut: int, guess: Tensor, pair: Pair, arrive: Arrive, clock: Clock) -> None:
        """Now or `queue` batches later."""
        live: SyntheticLive = state.live
        if self.queue:
            kept = Pair(*(t.contiguous() for t in pair))  # a checkpoint keeps no other layout
            live.waiting.add(cut, kept, arrive)
        else:
            arrive()
            live.learn(guess, pair.target, live.worker.size / clock.batch)

    def _tell_cosine(self, state: State, cut: int, guess: Tensor, target: Tensor, clock: Clock) -> None:
        import torch

        alike = torch.cosine_similarity(guess.detach().flatten(1), target.flatten(1))
        self.tell(state, self.names(state.live)[cut], alike.sum() / clock.batch)

    def names(self, live: DecoupledLive) -> list[str]:
        return [f"cosine_{end}" for end in live.net.ends]

    def _apply(self, state: State, clock: Clock) -> None:
        live: SyntheticLive = state.live
        if self.queue:
            for cut, pair, batch in live.waiting.due(self.queue, clock.batch):
                live.learn(live.guess(cut, pair), pair.target, live.worker.size / batch)
        Decoupled._apply(self, state, clock)

    def settle(self, state: State) -> None:
        state.live.waiting.arrive()
        Decoupled.settle(self, state)

    def refresh(self, state: State, read: Callable[[int], Batch]) -> None:
        """Running statistics that saw guessed inputs are estimated anew, since evaluation passes real ones."""
        Decoupled.refresh(self, state, read)
        if self.guess_inputs and tracking(state.live.net):
            reestimate(state.live.net, read(ESTIMATED).x, state.live.worker)

    def gather(self, state: State) -> None:
        Decoupled.gather(self, state)
        state.saved["waiting"] = state.live.waiting.whole()


@dataclass(slots=True, kw_only=True)
class SyntheticLive(DecoupledLive):
    waiting: Waiting

    def guess(self, cut: int, pair: Pair) -> Tensor:
        with self.worker.autocast():
            guess: Tensor = self.helpers[cut](pair.h, pair.y)
        return guess.to(pair.target.dtype)

    def guess_input(self, cut: int, x: Tensor) -> Tensor:
        with self.worker.autocast():
            guess: Tensor = self.helpers[len(self.parts) - 1 + cut](x)
        return guess

    def learn(self, guess: Tensor, target: Tensor, unit: float) -> None:
        """Adds the gradient of the squared error, summed over an example's values and averaged over the global batch."""
        import torch

        error = guess.to(torch.promote_types(guess.dtype, torch.float32)) - target
        self.worker.backward(error.square().sum() * unit)
