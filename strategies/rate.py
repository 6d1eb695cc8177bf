"""Learning-rate schedules: pure functions of the clock."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

from strategies.contract import Clock, PlanError


@dataclass(frozen=True, slots=True)
class Constant:
    def __call__(self, done: float) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class Cosine:
    """(1 + cos(pi p)) / 2 (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts)."""

    def __call__(self, done: float) -> float:
        return 0.5 * (1 + cos(pi * done))


@dataclass(frozen=True, slots=True)
class Polynomial:
    """(1 - end) (1 - p)^power + end; power 1 is linear decay."""

    power: float = 1.0
    end: float = 0.0

    def __call__(self, done: float) -> float:
        return (1 - self.end) * (1 - done) ** self.power + self.end


@dataclass(frozen=True, slots=True)
class Steps:
    """Times `factor` at each share of the run in `at`."""

    at: tuple[float, ...]
    factor: float

    def __call__(self, done: float) -> float:
        return self.factor ** sum(done >= share for share in self.at)


@dataclass(frozen=True, slots=True)
class Rate:
    """Linear warm-up per iteration over `warmup` epochs, from `start` x peak to `peak`, then `decay` over what remains."""

    peak: float
    warmup: float = 0.0
    start: float = 0.0
    decay: Constant | Cosine | Polynomial | Steps = Constant()

    def __call__(self, clock: Clock) -> float:
        if clock.epoch < self.warmup:
            risen = (clock.epoch + clock.epochs_per_step) / (self.warmup + clock.epochs_per_step)
            return self.peak * (self.start + (1 - self.start) * risen)
        first = self.warmup / (clock.epochs_per_step * clock.steps)
        return self.peak * self.decay((clock.done - first) / (1 - first) if first < 1 else 1.0)


POWERS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5, "adam_sde": 0.5}
RULES = (*POWERS, "noise_scale")
ROUNDING = 1e-9  # of a beta


def scaled(peak: float, batch: int, per: int, rule: str, noise_scale: float | None = None) -> float:
    """The peak rate at a global batch of `batch`, stated at `per`: times (batch / per) to the rule's power, or for the rule
    noise_scale as eta / (1 + noise_scale / batch), with the gradient noise scale in examples.

    linear: Goyal et al. 2017, arXiv 1706.02677; sqrt: Hoffer et al. 2017, arXiv 1705.08741; adam_sde: see `adam_sde`;
    noise_scale: McCandlish et al. 2018, arXiv 1812.06162. Raises PlanError for another rule, or a noise scale out of place.
    """
    if rule not in RULES:
        raise PlanError(f"unknown scaling rule {rule!r}, expected one of {', '.join(RULES)}")
    if (rule == "noise_scale") != (noise_scale is not None):
        raise PlanError("scale: noise_scale and the option noise_scale, in examples, go together: give both or neither")
    if noise_scale is not None:
        return peak * (1 + noise_scale / per) / (1 + noise_scale / batch)
    return peak * (batch / per) ** POWERS[rule]


def adam_sde(beta1: float, beta2: float, eps: float, batch: int, per: int) -> tuple[float, float, float]:
    """Adam's (beta1, beta2, eps) at `batch`, stated at `per`, beside a rate scaled by the square root of k = batch / per.

    1 - beta grows k times and eps shrinks by sqrt(k), so that the limiting stochastic differential equation stays (Malladi
    et al. 2022, arXiv 2205.10287). Raises PlanError where no beta is left.
    """
    k = batch / per
    scaled = {"beta1": beta1 - (k - 1) * (1 - beta1), "beta2": beta2 - (k - 1) * (1 - beta2)}
    for name, old in (("beta1", beta1), ("beta2", beta2)):
        if scaled[name] < ROUNDING and k > 1:
            raise PlanError(
                f"adam_sde makes of {name} {old:g} at batch {per} {scaled[name]:.3g} at batch {batch}, expected > 0: "
                f"stay below batch {per / (1 - old):g}, or take a larger {name}"
            )
    return scaled["beta1"], scaled["beta2"], eps / k**0.5
