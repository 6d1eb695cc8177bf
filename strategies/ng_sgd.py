"""NG-SGD: natural-gradient SGD with online Fisher factors (Povey, Zhang & Khudanpur 2015, arXiv 1410.7455; Kaldi's nnet3).

The Fisher matrix of an affine layer is taken as a product of a factor of its inputs [x; 1] and one of the gradients of its
outputs. Each factor is F = Q' diag(d) Q + rho I of low rank R, follows its rows from batch to batch (`online_fisher`), and is
smoothed to F + alpha tr(F) / D I before its inverse acts; then each side's rows get the norm back that they had:

    grad <- gamma_in gamma_out P_out grad P_in

so the rate keeps its meaning: of the gradient of the mean loss (the authors' rate per sample, times the batch). A batch meets
factors as they were before it. A convolution is preconditioned by the rows and columns of its gradient, as in Kaldi, or as an
affine layer, with `patch_affine`. Norm parameters, and what is neither linear nor a two-dimensional convolution, keep their
gradients. Momentum and weight decay stay the optimizer's; a step that is not finite ends the trial. The first batch, which
starts the factors by three updates, costs D^2 values of memory for each side of D columns; sides of more than 4096 start by
one, and act from the second batch on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from strategies.backprop import Backprop, Gradient, Step, Update, amend
from strategies.contract import Clock, Need, Phase, Plan, PlanError, State, Strategy, Worker, option
from strategies.parts.max_change import MaxChange
from strategies.parts.passes import inside, share

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class NgSgd(Strategy):
    rank_in: int = option(
        20,
        "components of an input factor, at most half of its columns; 0: no factor. Rows of a convolution's gradient, which "
        "it has without patch_affine, have rank_out at least",
        ge=0,
    )
    rank_out: int = option(80, "components of an output factor, at most half of its columns; 0: no factor", ge=0)
    alpha: float = option(4.0, "multiples of the mean eigenvalue that are added to a factor", gt=0)
    history_samples: int = option(2000, "examples that a factor remembers: a batch of N enters by 1 - exp(-N/it)", ge=1)
    history_batches: int | None = option(
        None, "steps that all factors remember instead; none: examples, and 4 steps for rows of gradients", ge=1
    )
    update_period: int = option(4, "steps between updates of the factors, after the first 10 steps", ge=1)
    layer_change: float | None = option(0.75, "largest Euclidean norm of a layer's step, none: any", gt=0)
    total_change: float | None = option(2.0, "largest Euclidean norm of the network's step, none: any", gt=0)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        bounds = MaxChange(self.layer_change, self.total_change)
        return amend(phase, self, updates=(bounds, Precondition(self)), gradient=partial(inside, wrap=Counted))


@dataclass(frozen=True, slots=True)
class Counted:
    """The gradient as it was, whose examples count once in a factor's memory, however many passes are taken over them."""

    old: Gradient

    @property
    def needs(self) -> Need:
        return getattr(self.old, "needs", Need.NOTHING)

    def __call__(self, step: Step) -> Tensor:
        from strategies.parts.preconditioner import Preconditioner

        kept = next(state.live for state in step.updates if isinstance(state.live, Preconditioner))
        kept.share = share(step)
        return self.old(step)


@dataclass(frozen=True, slots=True)
class Precondition(Update):
    options: NgSgd
    needs = Need.LAYER_GRADS
    turn = 1

    def suits(self, learner: Backprop) -> None:
        others = [update for update in learner.updates if update.turn == self.turn and update is not self]
        if others:
            raise PlanError(f"ng_sgd preconditions gradients, but so does {others[0]}: leave one of the two out")

    def init(self, net: Net, worker: Worker) -> State:
        from strategies.parts.preconditioner import Preconditioner

        state = State()
        state.live = Preconditioner(net, worker, self.options, state)
        return state

    def before(self, state: State, clock: Clock) -> None:
        state.live.step(clock)

    def merge(self, state: State, worker: Worker) -> None:
        """Where workers step alone: their factors become one."""
        state.live.merge(worker)
