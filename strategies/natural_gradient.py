"""K-FAC: each layer's gradient is preconditioned by the inverse of a Kronecker-factored Fisher matrix.

U = (G + damping)^-1 grad (A + damping)^-1 with A = E[a a^T] of the layer's inputs and G = E[g g^T] of its output gradients
(Martens & Grosse 2015, arXiv 1503.05671; convolutions: Grosse & Martens 2016, arXiv 1602.01407). Served are plain linear
layers, two-dimensional convolutions and batch norms; other parameters keep their gradients. The optimizer moves by the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from strategies.backprop import Update, amend
from strategies.contract import Clock, Need, Phase, Plan, PlanError, State, Strategy, Worker, option
from strategies.curvature.precondition import Geometric, Inverse, Options, Precondition, Watched
from strategies.curvature.refresh import Refresh
from strategies.optimizers import Sgd
from strategies.parts.passes import inside

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class NaturalGradient(Strategy):
    damping: float = option(
        1e-3, "added to the Fisher matrix, whose unit is that of an example's squared gradient", gt=0
    )
    damping_end: float = option(
        1.0, "damping at the end of the phase over that at its start; geometric in between", gt=0
    )
    fisher: Literal["empirical", "sampled"] = option(
        "empirical",
        "gradients of the labels that are there, or of labels drawn from the model, by a second backward pass",
    )
    positions: Literal["expand", "reduce"] = option(
        "expand",
        "positions of a convolution as examples of their own, or summed first, which is exact before a global mean",
    )
    inverse: Inverse = option(
        "cholesky",
        "damping shared out between factors; or exact, in eigenvectors; or with eigenvalues corrected by each example",
    )
    memory: float = option(
        0.95, "share of the old factor that stays when it is made anew, after as many equal shares", ge=0, lt=1
    )
    factors_every: int = option(10, "steps from one update of factors to the next", ge=1)
    inverses_every: int = option(100, "steps from one inversion to the next", ge=1)
    eager: int = option(10, "steps at the start of a phase that all update and invert", ge=0)
    tolerance: float = option(
        0.0,
        "relative change below which a factor waits longer for its next update, as in SP-NGD; 0: intervals are fixed",
        ge=0,
    )
    kl_clip: float = option(
        1e-3,
        "bound on rate^2 times the product of old and new gradients, above which new ones are scaled down; 0: none",
        ge=0,
    )
    largest: int = option(4096, "side of a factor above which a layer keeps its gradient", ge=0)
    gradient_workers: float = option(
        1.0, "share of workers that hold a layer's inverse: less memory, more traffic", gt=0, le=1
    )
    tie_momentum: bool = option(False, "SGD's momentum falls with the rate: times rate over the highest rate so far")
    project: bool = option(False, "weights of a layer are scaled down to the norm sqrt(2 d_out) after each step")

    def __post_init__(self) -> None:
        Strategy.__post_init__(self)
        if self.inverse == "ekfac" and self.inverses_every == 1 and not self.tolerance:
            raise PlanError(
                "natural_gradient: ekfac corrects eigenvalues by what steps see between inversions, but with inverses_every: 1 "
                "there are none: raise it, set a tolerance, or choose eigen"
            )

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        updates: tuple[Update, ...] = (Precondition(self._options()), *((ProjectWeights(),) if self.project else ()))
        changes = {"optimizer": self._tied} if self.tie_momentum else {}
        return amend(phase, self, updates=updates, gradient=partial(inside, wrap=Watched), **changes)

    def _options(self) -> Options:
        return Options(
            refresh=Refresh(self.factors_every, self.inverses_every, self.eager, self.tolerance),
            damping=Geometric(self.damping, self.damping_end),
            fisher=self.fisher,
            reduce=self.positions == "reduce",
            inverse=self.inverse,
            memory=self.memory,
            kl_clip=self.kl_clip,
            largest=self.largest,
            gradient_workers=self.gradient_workers,
        )

    def _tied(self, old: object) -> TiedMomentum:
        if not isinstance(old, Sgd):
            raise PlanError(f"natural_gradient: tie_momentum is of SGD, but the optimizer is {old}: leave it out")
        return TiedMomentum(old)


@dataclass(frozen=True, slots=True)
class ProjectWeights(Update):
    """The weights of linear layers and convolutions go no further than sqrt(2 d_out) from zero (Osawa et al. 2020)."""

    needs = Need.LAYER_WEIGHTS | Need.EDIT_WEIGHTS

    def init(self, net: Net, worker: Worker) -> State:
        from torch import nn

        layers = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        return State(live=[layer.weight for layer in layers if layer.weight.requires_grad])

    def after(self, state: State, clock: Clock) -> None:
        for weight in state.live:
            w = weight.detach()
            w.mul_(((2 * len(w)) ** 0.5 / w.norm()).clamp(max=1.0))


@dataclass(frozen=True, slots=True)
class TiedMomentum:
    """v <- m v - rate U with m = momentum x rate / highest rate so far, so that their ratio stays (Osawa et al. 2020).

    In torch's form, where w moves by -rate v, that is a momentum of m x (rate of the step before) / highest rate.
    """

    sgd: Sgd

    def __call__(self, net: Net) -> Optimizer:
        optimizer = self.sgd(net)
        for group in optimizer.param_groups:
            group |= {"highest_rate": 0.0, "last_rate": None}
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: self._tie(optimizer.param_groups))
        return optimizer

    def _tie(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            rate = group["lr"] / group.get("rate_factor", 1.0)  # the schedule's: factors change where kernels grow
            last = group["last_rate"]
            group["highest_rate"] = highest = max(group["highest_rate"], rate)
            group["momentum"] = self.sgd.momentum * (rate if last is None else last) / (highest or 1.0)
            group["last_rate"] = rate
