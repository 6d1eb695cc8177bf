"""How curvature takes part in training: a gradient that it watches, and an update that preconditions. Imports no torch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from strategies.backprop import Backprop, Gradient, Step, Update
from strategies.contract import Clock, Metrics, Need, PlanError, Schedule, State, Worker
from strategies.curvature.refresh import Refresh

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.curvature.estimate import Curvature
    from strategies.net import Net

Inverse: TypeAlias = Literal["cholesky", "eigen", "ekfac"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `strategies.natural_gradient` says of its options."""

    refresh: Refresh
    damping: Schedule
    fisher: Literal["empirical", "sampled"] = "empirical"
    reduce: bool = False
    inverse: Inverse = "cholesky"
    memory: float = 0.95
    kl_clip: float = 0.0
    largest: int = 4096
    gradient_workers: float = 1.0


@dataclass(frozen=True, slots=True)
class Geometric:
    """From `start` to `start` x `end` over the phase."""

    start: float
    end: float

    def __call__(self, clock: Clock) -> float:
        return self.start * self.end**clock.done


@dataclass(frozen=True, slots=True)
class Watched:
    """The gradient as it was, seen by the curvature of `Precondition`."""

    old: Gradient

    @property
    def needs(self) -> Need:
        return getattr(self.old, "needs", Need.NOTHING)

    def __call__(self, step: Step) -> Tensor:
        curvature = next(state.saved["curvature"] for state in step.updates if "curvature" in state.saved)
        return curvature.watch(self.old, step)


@dataclass(frozen=True, slots=True)
class Precondition(Update):
    """p.grad <- F^-1 p.grad, with F estimated from the passes that `Watched` sees."""

    options: Options
    needs = Need.LAYER_GRADS
    turn = 1

    def suits(self, learner: Backprop) -> None:
        if sum(update.turn == self.turn for update in learner.updates) > 1:
            raise PlanError("natural_gradient preconditions gradients, and so does another method here: leave one out")
        self._check_labels(learner)

    def _check_labels(self, learner: Backprop) -> None:
        """Raises PlanError if labels are to be drawn for an objective that is more than a loss of labels."""
        if self.options.fisher == "sampled" and not getattr(learner.objective, "of_labels", True):
            raise PlanError(
                "natural_gradient: fisher: sampled draws labels, but a part of stage_wise reconstructs its input: write "
                "fisher: empirical, or leave out unsupervised"
            )

    def init(self, net: Net, worker: Worker) -> State:
        from strategies.curvature.estimate import Curvature

        curvature = Curvature(net, worker, self.options)
        if curvature.unserved and worker.rank == 0:
            log.warning("natural_gradient leaves the gradients of %s as they are", _some(curvature.unserved))
        return State({"curvature": curvature}, curvature)

    def before(self, state: State, clock: Clock) -> None:
        curvature: Curvature = state.saved["curvature"]
        curvature.refresh(clock)
        curvature.precondition(clock)

    def at_rate(self, state: State, rate: float) -> None:
        if self.options.kl_clip and rate:
            state.saved["curvature"].clip(self.options.kl_clip / rate**2)

    def metrics(self, state: State) -> Metrics:
        """`kl_scale`: by which the step was scaled down."""
        curvature: Curvature = state.saved["curvature"]
        return {"kl_scale": curvature.scale / curvature.worker.size} if self.options.kl_clip else {}

    def gather(self, state: State) -> None:
        state.saved["curvature"].gather()


def _some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
