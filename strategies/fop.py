"""Fisher-orthogonal projection: natural gradients of what two halves of a batch share, and of what they differ in.

Of the mean gradients g1 and g2 of two halves, g is the mean and d = g1 - g2. With F, a layer's damped Fisher matrix as
`natural_gradient` has it inverted, the layer's gradient becomes, before preconditioning (Lu & Armour 2025, arXiv 2508.13898),

    eta c,  c = g + beta d',  d' = d - s g,  s = d.Fg / g.Fg,  beta = g.F^-1 d' / d'.F^-1 d',  eta = g.F^-1 c / c.F^-1 c

d' is orthogonal to g under F; beta and eta minimise the quadratic model of the loss along F^-1 d' and along F^-1 c. Halves are
the workers of even and of odd rank; of a worker alone, its micro-batches of even and of odd number. With `inverse: eigen` or
`ekfac`, F is as cheap as its inverse; with `cholesky`, it takes two solves per layer and step, shared out over workers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from strategies.backprop import Backprop, Gradient, Step, amend
from strategies.contract import Clock, Need, Phase, Plan, PlanError, State, Strategy, Worker, option
from strategies.curvature.precondition import Precondition

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class Fop(Strategy):
    parts_matter: ClassVar[bool] = True
    strength: float = option(1.0, "times beta; 0: natural_gradient alone", ge=0)
    layer_steps: bool = option(True, "scale the gradient of each layer by eta")

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        phase = amend(phase, self, gradient=Halved)
        learner = phase.learner
        assert isinstance(learner, Backprop)
        if not any(isinstance(update, Precondition) for update in learner.updates):
            raise PlanError("fop changes what natural_gradient preconditions: name natural_gradient before it")
        changed = [Project(u.options, self) if isinstance(u, Precondition) else u for u in learner.updates]
        for update in changed:
            update.suits(dataclasses.replace(learner, updates=tuple(changed)))
        return dataclasses.replace(phase, learner=dataclasses.replace(learner, updates=tuple(changed)))


@dataclass(frozen=True, slots=True)
class Project(Precondition):
    """natural_gradient's update, on gradients that have been projected."""

    fop: Fop

    def suits(self, learner: Backprop) -> None:
        if sum(update.turn == self.turn for update in learner.updates) > 1:
            raise PlanError("fop changes natural_gradient: name natural_gradient once, and before it")
        self._check_labels(learner)

    def init(self, net: Net, worker: Worker) -> State:
        from strategies.parts.fisher_projection import Halves

        state = Precondition.init(self, net, worker)
        return State(state.saved, Halves(worker, state.live))

    def before(self, state: State, clock: Clock) -> None:
        halves = state.live
        halves.curvature.refresh(clock)
        halves.project(clock, self.fop.strength, self.fop.layer_steps)
        halves.curvature.precondition(clock)


def _inner(state: State) -> State:
    """As natural_gradient keeps it."""
    return State(state.saved, state.live.curvature)


@dataclass(frozen=True, slots=True)
class Halved:
    """The gradient `inner`, of which one half is summed up on the side."""

    inner: Gradient

    @property
    def needs(self) -> Need:
        return getattr(self.inner, "needs", Need.NOTHING)

    def __call__(self, step: Step) -> Tensor:
        from strategies.parts.fisher_projection import Halves

        kept = next(state for state in step.updates if isinstance(state.live, Halves))
        kept.live.meet(step)
        return self.inner(dataclasses.replace(step, updates=(*step.updates, _inner(kept))))
