"""`Backprop`, the usual learner: objective -> gradient -> updates -> optimizer at a scheduled rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from strategies.contract import (
    Batch,
    Clock,
    Metrics,
    Need,
    Objective,
    Phase,
    PlanError,
    Predict,
    Schedule,
    State,
    Worker,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from strategies.net import Net


class Update:
    """Changes gradients before the optimizer moves, or weights after it has. Subclasses are frozen dataclasses."""

    needs = Need.NOTHING
    turn: ClassVar[int] = 2
    """When it acts: 0: measures gradients as they come; 1: preconditions them; 2: the rest, in the order of the recipe."""

    def suits(self, learner: Backprop) -> None:
        """Raises PlanError if this update is not made for the learner that it is part of; asked after each edit of it."""

    def init(self, net: Net, worker: Worker) -> State:
        return State()

    def before(self, state: State, clock: Clock) -> None:
        """p.grad holds the mean gradient over the global batch, alike on all ranks."""

    def after(self, state: State, clock: Clock) -> None:
        """Weights have moved."""

    def metrics(self, state: State) -> Metrics:
        """What to log of the step, as this rank's share: logged are means over steps of sums over ranks."""
        return {}

    def rate(self, state: State, schedule: Schedule, clock: Clock) -> float | None:
        """The rate of this step, where it is not the schedule's; asked for when all have changed the gradients."""
        return None

    def at_rate(self, state: State, rate: float) -> None:
        """All have changed the gradients, and the step will be taken at this rate: for what follows both."""

    def ended(self, state: State) -> bool:
        """Whether the phase ends with this step, before all of its steps are taken; alike on all ranks."""
        return False

    def settle(self, state: State) -> None:
        """Before each row, on all ranks: make what is in `state.saved` alike on all."""

    def gather(self, state: State) -> None:
        """Before each checkpoint, on all ranks: make what is spread over them whole on rank 0, until the next step."""

    def refresh(self, state: State, read: Callable[[int], Batch]) -> None:
        """Before each evaluation: `read(n)` gives n training examples, alike on all ranks, or all if there are fewer."""

    def weights(self, state: State) -> Mapping[str, Tensor] | None:
        """The weights to evaluate and to keep, where they are not the network's own."""
        return None


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Mean cross-entropy over the micro-batch; `smoothing` moves that share of each label evenly to all classes."""

    smoothing: float = 0.0

    def __call__(self, predict: Predict, batch: Batch, clock: Clock) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(predict(batch.x), batch.y, label_smoothing=self.smoothing)


@dataclass(frozen=True, slots=True)
class Step:
    """What a gradient works on: one micro-batch of one optimizer step."""

    predict: Predict
    objective: Objective
    batch: Batch
    clock: Clock
    weight: float  # of this micro-batch's mean gradient in the worker's gradient; averaged over workers afterwards
    worker: Worker
    net: Net
    updates: Sequence[State] = ()  # what the learner's updates keep: one that watches gradients finds its own

    def loss(self) -> Tensor:
        """() mean loss over the micro-batch, computed under the trial's precision."""
        with self.worker.autocast():
            return self.objective(self.predict, self.batch, self.clock)


Gradient: TypeAlias = Callable[[Step], "Tensor"]
"""Adds weight * d(loss)/dp to p.grad; returns the loss."""


def one_forward_one_backward(step: Step) -> Tensor:
    loss = step.loss()
    step.worker.backward(loss * step.weight)
    return loss.detach()


@dataclass(slots=True)
class Live:
    """What `Backprop.init` makes anew on every worker and after every resume."""

    net: Net
    model: nn.Module  # the net as the engine wraps it for training
    optimizer: Optimizer
    worker: Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Backprop:
    """Gradient descent by backpropagation."""

    optimizer: Callable[[Net], Optimizer]
    rate: Schedule
    objective: Objective = CrossEntropy()
    gradient: Gradient = one_forward_one_backward
    updates: tuple[Update, ...] = ()

    @property
    def needs(self) -> Need:
        needs = getattr(self.gradient, "needs", Need.NOTHING)
        for update in self.updates:
            needs |= update.needs
        return needs

    @property
    def ends_itself(self) -> bool:
        """Whether an update may end a phase before all of its steps are taken."""
        return any(type(update).ended is not Update.ended for update in self.updates)

    def init(self, net: Net, worker: Worker) -> State:
        optimizer = self.optimizer(net.train())
        names = {id(p): name for name, p in net.named_parameters()}
        order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        updates = [update.init(net, worker) for update in self.updates]
        model = worker.prepare(net, optimizer, open_model=Need.OPEN_MODEL in self.needs)
        saved = {"net": net, "optimizer": worker.whole(optimizer), "updates": updates, "engine": worker.memory}
        saved["names"] = order  # of the optimizer's parameters, which it knows by number
        return State(saved, Live(net, model, optimizer, worker))

    def step(self, state: State, batches: Sequence[Batch], clock: Clock) -> Metrics:
        live: Live = state.live
        if not live.net.training:  # walking through all modules costs as much as a small layer
            live.net.train()
        last = len(batches) - 1
        loss = sum(self._micro(state, batch, clock, last=number == last) for number, batch in enumerate(batches))
        self._apply(state, clock)
        metrics: Metrics = {"loss": loss}  # type: ignore[dict-item]
        for update, own in zip(self.updates, state.saved["updates"], strict=True):
            metrics |= update.metrics(own)
        return metrics

    def _micro(self, state: State, batch: Batch, clock: Clock, last: bool) -> Tensor:
        live, share, updates = state.live, len(batch) / clock.batch, state.saved["updates"]
        step = Step(live.model, self.objective, batch, clock, share * live.worker.size, live.worker, live.net, updates)
        with live.worker.micro(live.model, last):
            return self.gradient(step) * share

    def _apply(self, state: State, clock: Clock) -> None:
        live: Live = state.live
        live.worker.apply(live.model, live.optimizer, *self._around(state, clock))

    def _around(self, state: State, clock: Clock) -> tuple[Callable[[], None], Callable[[], None]]:
        """What happens before the optimizer moves, gradients being there, and after."""
        live: Live = state.live
        pairs = list(zip(self.updates, state.saved["updates"], strict=True))

        def before() -> None:
            for update, own in pairs:
                update.before(own, clock)
            rates = [rate for update, own in pairs if (rate := update.rate(own, self.rate, clock)) is not None]
            rate = rates[0] if rates else self.rate(clock)
            for update, own in pairs:
                update.at_rate(own, rate)
            _set_rate(live.optimizer, rate)

        def after() -> None:
            for update, own in pairs:
                update.after(own, clock)

        return before, after

    def predict(self, state: State, x: Tensor) -> Tensor:
        from torch.func import functional_call

        live: Live = state.live
        live.net.eval()
        averaged = self.averaged(state)
        with live.worker.autocast():
            return functional_call(live.net, averaged, (x,)) if averaged else live.net(x)

    def averaged(self, state: State) -> dict[str, Tensor]:
        """Weights that an update puts in place of the network's own."""
        found = [update.weights(own) for update, own in zip(self.updates, state.saved["updates"], strict=True)]
        return {name: value for weights in found if weights for name, value in weights.items()}

    def ended(self, state: State) -> bool:
        return any(update.ended(own) for update, own in zip(self.updates, state.saved["updates"], strict=True))

    def settle(self, state: State) -> None:
        for update, own in zip(self.updates, state.saved["updates"], strict=True):
            update.settle(own)

    def gather(self, state: State) -> None:
        for update, own in zip(self.updates, state.saved["updates"], strict=True):
            update.gather(own)

    def refresh(self, state: State, read: Callable[[int], Batch]) -> None:
        for update, own in zip(self.updates, state.saved["updates"], strict=True):
            update.refresh(own, read)

    def finish(self, state: State) -> None:
        """The weights that stand for the result become the network's own."""
        state.live.net.load_state_dict(self.averaged(state), strict=False)


def _set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)


def amend(
    phase: Phase,
    by: object,
    *,
    updates: tuple[Update, ...] = (),
    **changes: Callable[[Any], Any],
) -> Phase:
    """The phase with updates added, after those that are there and have the same turn, and each further field of its Backprop
    replaced by `change(old value)`.

    Raises PlanError, naming both sides, if the phase does not learn by Backprop.
    """
    learner = phase.learner
    name = type(by).__name__
    if not isinstance(learner, Backprop):
        raise PlanError(
            f"{name} works on gradients, but phase '{phase.name}' learns by {type(learner).__name__}: "
            "put it before, or leave one of the two out"
        )
    new = {field: change(getattr(learner, field)) for field, change in changes.items()}
    in_turn = tuple(sorted(learner.updates + updates, key=lambda update: update.turn))
    learner = dataclasses.replace(learner, updates=in_turn, **new)
    for update in learner.updates:
        update.suits(learner)
    averages = [update for update in learner.updates if type(update).weights is not Update.weights]
    if len(averages) > 1:
        raise PlanError(f"{averages[0]} and {averages[1]} both average weights in phase '{phase.name}': leave one out")
    return dataclasses.replace(phase, learner=learner)
