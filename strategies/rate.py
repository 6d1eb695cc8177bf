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


RULES = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}


def scaled(peak: float, batch: int, per: int, rule: str) -> float:
    """The peak rate at a global batch of `batch`, stated at `per`: times (batch / per) to the rule's power.

    linear: Goyal et al. 2017, arXiv 1706.02677; sqrt: Hoffer et al. 2017, arXiv 1705.08741.
    """
    if rule not in RULES:
        raise PlanError(f"unknown scaling rule {rule!r}, expected one of {', '.join(RULES)}")
    return peak * (batch / per) ** RULES[rule]
