"""The learner of `synthetic_gradient`: modules move by guessed gradients of the loss by their outputs.

The reference implementation: all modules of one minibatch one after the other on each worker, in the order of the equations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from strategies.contract import Batch, Clock, Metrics, State, Worker
from strategies.decoupled.learner import Decoupled, DecoupledLive
from strategies.decoupled.waiting import Pair, Waiting
from strategies.optimizers import AdamW

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from strategies.decoupled.boundary import CutNet
    from strategies.net import Net

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
        state.live = SyntheticLive(**values, waiting=Waiting(worker, len(old.parts) - 1))
        state.saved["waiting"] = None
        return state

    def step(self, state: State, batches: Sequence[Batch], clock: Clock) -> Metrics:
        if state.saved["waiting"] is not None:
            state.live.waiting.restore(state.saved["waiting"])
            state.saved["waiting"] = None
        return Decoupled.step(self, state, batches, clock)

    def exchange(self, state: State, batch: Batch, clock: Clock, weight: float) -> Tensor:
        from strategies.decoupled.boundary import forward

        live: SyntheticLive = state.live
        guessed = [live.guess_input(cut, batch.x) for cut in range(len(live.parts) - 1) if self.guess_inputs]
        given, made = forward(live.parts, batch.x, live.worker, guessed)
        with live.worker.autocast():
            loss = self.objective(live.parts[-1], dataclasses.replace(batch, x=given[-1]), clock)
        live.worker.backward(loss * weight)
        for cut in reversed(range(len(made))):
            self._cross(state, cut, made[cut], given[cut + 1], batch.y, clock)
        for guess, true in zip(guessed, made, strict=False):
            live.learn(guess, true.detach(), live.worker.size / clock.batch)
        return loss.detach()

    def _cross(self, state: State, cut: int, made: Tensor, given: Tensor, y: Tensor, clock: Clock) -> None:
        """Backward over one cut: what the module above gave for `given` becomes what the one below gets for `made`."""
        import torch

        from strategies.decoupled.boundary import inject

        live: SyntheticLive = state.live
        back, unit, share = given.grad, live.worker.size / clock.batch, self.share(clock)
        assert back is not None
        pair = Pair(made.detach(), y, back.to(torch.promote_types(back.dtype, torch.float32)) / unit)
        with torch.set_grad_enabled(not self.queue):
            guess = live.guess(cut, pair)
        inject(made, share * back + (1 - share) * unit * guess.detach(), live.worker)
        alike = torch.cosine_similarity(guess.detach().flatten(1), pair.target.flatten(1))
        self.tell(state, f"cosine_{live.net.ends[cut]}", alike.sum() / clock.batch)
        if self.queue:
            live.waiting.add(cut, pair)
        else:
            live.learn(guess, pair.target, unit)

    def _apply(self, state: State, clock: Clock) -> None:
        live: SyntheticLive = state.live
        if self.queue:
            for cut, pair, batch in live.waiting.due(self.queue, clock.batch):
                live.learn(live.guess(cut, pair), pair.target, live.worker.size / batch)
        Decoupled._apply(self, state, clock)

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
