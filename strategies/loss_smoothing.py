"""Loss smoothing for large batches, in inputs or in weights (after Naganuma & Yokota 2019, CCGRID).

Natural gradients at large batches find sharp minima of the training loss; that paper smooths the loss, and the group's later
ImageNet runs mix examples in a running fashion and erase parts of images (Osawa et al. 2019, arXiv 1811.12019). Smoothing goes
with any optimizer here. `alpha`: running mixup (strategies/parts/running_mixup.py); `erase`: random erasing, after all mixing;
`sigma`: E L(w + u) over Gaussian u. Each may fall to 0 over a phase: graduated optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.backprop import Gradient, amend
from strategies.contract import Phase, Plan, Schedule, Strategy, option
from strategies.parts.annealing import Anneal, falling
from strategies.parts.batch_maps import with_map
from strategies.parts.random_erasing import SMALLEST, Erase
from strategies.parts.running_mixup import RunningMixup
from strategies.parts.weight_noise import SeveralPasses, WeightNoise


@dataclass(frozen=True, slots=True)
class LossSmoothing(Strategy):
    alpha: float = option(0.4, "running mixup: both parameters of the Beta distribution of shares; 0: none", ge=0)
    erase: float = option(0.0, "random erasing: probability per image; 0: none", ge=0, le=1)
    erase_area: float = option(0.25, "share of an image that is erased at most", ge=SMALLEST, le=1)
    erase_aspect: float = option(0.3, "shorter over longer side of what is erased, at least", gt=0, le=1)
    sigma: float = option(0.0, "weight noise: its standard deviation; 0: none", ge=0)
    relative: bool = option(True, "sigma counts in root mean squares of each parameter, else it is absolute")
    draws: int = option(1, "draws of the weight noise per step, each of a forward and a backward pass", ge=1)
    antithetic: bool = option(False, "take the weight noise with either sign, in twice the passes")
    anneal: Anneal = option("none", "how alpha, erase and sigma fall to 0 over each phase, if at all")

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        if self.alpha:
            phase = with_map(phase, RunningMixup(self._strength(self.alpha)))
        if self.erase:
            phase = with_map(phase, Erase(self._strength(self.erase), self.erase_area, self.erase_aspect))
        if not self.sigma:
            return amend(phase, self)
        several = self.draws * (1 + self.antithetic) > 1
        return amend(phase, self, gradient=self._gradient, updates=(SeveralPasses(),) if several else ())

    def _gradient(self, inner: Gradient) -> WeightNoise:
        return WeightNoise(inner, self._strength(self.sigma), self.draws, self.antithetic, self.relative)

    def _strength(self, full: float) -> Schedule:
        return falling(full, self.anneal)
