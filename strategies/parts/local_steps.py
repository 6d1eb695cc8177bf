"""Workers that step alone and join their weights now and then: what `post_local_sgd` and `parameter_averaging` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, cast

from strategies.backprop import Backprop, Live, Update, amend
from strategies.contract import Batch, Clock, Metrics, Need, Phase, PlanError, State, Worker
from strategies.parts.replicas import average_, gathered, scatter_, tensors_in

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class OpenModel(Update):
    """Changes nothing: tells the engine that gradients are not always averaged, and that weights are written."""

    needs = Need.OPEN_MODEL | Need.EDIT_WEIGHTS


class Apart:
    """A worker as updates see it: while `alone`, the only one there is, and all else as it is."""

    def __init__(self, worker: Worker):
        self.worker, self.alone = worker, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)

    @property
    def size(self) -> int:
        return 1 if self.alone else self.worker.size

    @property
    def rank(self) -> int:
        return 0 if self.alone else self.worker.rank

    def sum_(self, t: Tensor) -> Tensor:
        return t if self.alone else self.worker.sum_(t)


@dataclass(slots=True)
class LocalLive(Live):
    apart: Apart


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSteps(Backprop):
    """Backprop whose workers step alone from `start` on, and join after every `period` steps and after the last.

    Updates then see one worker and its share of the batch. Rows show the mean of all workers' weights, and training goes on
    from each worker's own.
    """

    start: float
    period: int

    def __post_init__(self) -> None:
        for update in self.updates:
            if not getattr(update, "alone", False) and any(
                getattr(type(update), name) is not getattr(Update, name) for name in COMMON
            ):
                raise PlanError(
                    "post_local_sgd and parameter_averaging let workers have weights of their own, but "
                    f"{update} follows those of all: leave one of the two out"
                )

    def init(self, net: Net, worker: Worker) -> State:
        apart = Apart(worker)
        state = Backprop.init(self, net, cast(Worker, apart))
        live: Live = state.live
        state.live = LocalLive(live.net, live.model, live.optimizer, worker, apart)
        state.saved |= {"alone": False, "replicas": None}  # whether a local step was taken; what workers have at a row
        return state

    def step(self, state: State, batches: Sequence[Batch], clock: Clock) -> Metrics:
        live: LocalLive = state.live
        if state.saved["replicas"] is not None:
            scatter_(state.saved["replicas"], self.own(state), live.worker.rank)
            state.saved["replicas"] = None
        local = clock.step - ceil(self.start * clock.steps)  # steps taken alone before this one
        live.apart.alone = local >= 0
        metrics = Backprop.step(self, state, batches, clock)
        if live.apart.alone and ((local + 1) % self.between(state, clock) == 0 or clock.step + 1 == clock.steps):
            self.join(state)
        return metrics

    def _apply(self, state: State, clock: Clock) -> None:
        live: LocalLive = state.live
        if not live.apart.alone:
            return Backprop._apply(self, state, clock)
        share = dataclasses.replace(clock, batch=max(1, clock.batch // live.worker.size))
        before, after = self._around(state, share)
        before()
        live.optimizer.step()
        after()
        live.optimizer.zero_grad(set_to_none=True)
        state.saved["alone"] = True

    def between(self, state: State, clock: Clock) -> int:
        """Steps from one join to the next."""
        return self.period

    def join(self, state: State) -> None:
        """Weights become the mean over workers; all else stays each worker's own."""
        average_(list(state.live.net.parameters()), state.live.worker)

    def own(self, state: State) -> list[Tensor]:
        """What differs between workers: weights, and what optimizer and updates keep."""
        kept = [update.saved for update in state.saved["updates"]]
        return [*state.live.net.parameters(), *tensors_in(state.live.optimizer.state_dict()), *tensors_in(kept)]

    def settle(self, state: State) -> None:
        """The mean of all workers' weights becomes the network's, until the next step. What each worker has is put aside."""
        if state.saved["alone"]:
            live: LocalLive = state.live
            state.saved["replicas"] = gathered(self.own(state), live.worker)
            average_(list(live.net.parameters()), live.worker)


COMMON = ("after", "metrics", "rate", "settle", "weights")
"""By these, an update acts on weights or gradients that all workers share, unless it has `alone = True`."""


def stepping_alone(phase: Phase, by: object, kind: type[LocalSteps], **options: Any) -> Phase:
    """The phase with a learner of this kind, made of its Backprop and the options. Raises PlanError if it has one already."""
    if isinstance(phase.learner, LocalSteps):
        raise PlanError(
            f"{type(by).__name__}: workers step alone in phase '{phase.name}' already: of post_local_sgd and "
            "parameter_averaging, leave one out"
        )
    learner: Any = amend(phase, by, updates=(OpenModel(),)).learner
    usual = {f.name: getattr(learner, f.name) for f in dataclasses.fields(Backprop)}
    return dataclasses.replace(phase, learner=kind(**usual, **options))
