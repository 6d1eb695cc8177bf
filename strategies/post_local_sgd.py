"""Post-local SGD: late in training workers step alone and average their weights (Lin et al. 2018, arXiv 1808.07217).

Up to `start`, gradients are averaged at each step. From then on each of W workers steps on the gradient of its own share of the
batch, and weights are averaged after every `period` steps and after the last. Momentum stays each worker's own. Rows show
the mean of all workers' weights, and training goes on from each worker's own, so that logging changes nothing; for that,
each row costs every worker memory and traffic of all workers' weights and momentum, so keep rows far apart on many workers.
Running statistics of batch norms are the mean over workers; `ghost_batch_norm` with `statistics: mean` makes one small
collective of its own at each step, also when workers step alone, and with `in_order` none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

from strategies.backprop import Backprop, Live, Update, amend
from strategies.contract import Batch, Clock, Metrics, Need, Phase, Plan, PlanError, State, Strategy, Worker, option
from strategies.replicas import average_, gathered, scatter_, tensors_in

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class PostLocalSgd(Strategy):
    parts_matter: ClassVar[bool] = True
    start: float = option(0.5, "share of the phase after which workers step alone; 1: never", ge=0, le=1)
    period: int = option(16, "steps between averages of the weights; 1: synchronous SGD", ge=1)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        learner: Any = amend(phase, self, updates=(OpenModel(),)).learner
        usual = {f.name: getattr(learner, f.name) for f in dataclasses.fields(Backprop)}
        return dataclasses.replace(phase, learner=LocalSteps(**usual, start=self.start, period=self.period))


@dataclass(frozen=True, slots=True)
class OpenModel(Update):
    """Changes nothing: tells the engine that gradients are not always averaged, and that weights are written."""

    needs = Need.OPEN_MODEL | Need.EDIT_WEIGHTS


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSteps(Backprop):
    """Backprop whose workers step alone from `start` on, and average their weights every `period` steps."""

    start: float
    period: int

    def __post_init__(self) -> None:
        for update in self.updates:
            if any(getattr(type(update), name) is not getattr(Update, name) for name in COMMON):
                raise PlanError(
                    f"post_local_sgd lets workers have weights of their own, but {update} follows those of all: "
                    "leave one of the two out"
                )

    def init(self, net: Net, worker: Worker) -> State:
        state = Backprop.init(self, net, worker)
        state.saved |= {"alone": False, "replicas": None}  # whether a local step was taken; what workers have at a row
        return state

    def step(self, state: State, batches: Sequence[Batch], clock: Clock) -> Metrics:
        if state.saved["replicas"] is not None:
            scatter_(state.saved["replicas"], _own(state.live), state.live.worker)
            state.saved["replicas"] = None
        return Backprop.step(self, state, batches, clock)

    def _apply(self, state: State, clock: Clock) -> None:
        first = ceil(self.start * clock.steps)
        if clock.step < first:
            return Backprop._apply(self, state, clock)
        live: Live = state.live
        before, after = self._around(state, clock)
        before()
        live.optimizer.step()
        after()
        live.optimizer.zero_grad(set_to_none=True)
        state.saved["alone"] = True
        if (clock.step + 1 - first) % self.period == 0 or clock.step + 1 == clock.steps:
            average_(list(live.net.parameters()), live.worker)

    def settle(self, state: State) -> None:
        """The mean of all workers' weights becomes the network's, until the next step. What each worker has is put aside."""
        if state.saved["alone"]:
            live: Live = state.live
            state.saved["replicas"] = gathered(_own(live), live.worker)
            average_(list(live.net.parameters()), live.worker)


COMMON = (
    "after",
    "metrics",
    "rate",
    "weights",
)  # by these, an update acts on weights or gradients that all workers share


def _own(live: Live) -> list[Tensor]:
    """What differs between workers: weights and the optimizer's memory."""
    return [*live.net.parameters(), *tensors_in(live.optimizer.state_dict())]
