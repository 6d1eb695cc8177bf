"""The law of the critical batch size, S = S_min (1 + B_crit / B), and what one trial says about it.

McCandlish et al. 2018 (arXiv 1812.06162) write it as (S / S_min - 1) (E / E_min - 1) = 1 for S optimizer steps and E = B S
examples to target. With E_min = S_min B_crit that is the same: S / S_min - 1 = B_crit / B and E / E_min - 1 = B / B_crit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Law:
    """At batch size `critical` a target takes twice the fewest steps and twice the fewest examples."""

    steps_min: float  # as the batch grows without bound
    critical: float  # examples per step

    @property
    def examples_min(self) -> float:
        """As the batch shrinks: lim B S(B) for B -> 0 is S_min B_crit."""
        return self.steps_min * self.critical

    def steps(self, batch: float) -> float:
        return self.steps_min * (1 + self.critical / batch)

    def examples(self, batch: float) -> float:
        """B S(B) = S_min (B + B_crit) = E_min (1 + B / B_crit)."""
        return self.examples_min * (1 + batch / self.critical)

    def batch_for_steps(self, steps: float) -> float:
        """The smallest batch size that needs no more than `steps`; inf if none does."""
        return self.critical / (steps / self.steps_min - 1) if steps > self.steps_min else math.inf

    def batch_for_examples(self, examples: float) -> float:
        """The largest batch size that needs no more than `examples`; 0 if none does."""
        return self.critical * max(0.0, examples / self.examples_min - 1)

    def useful_batch(self, first: float, excess: float = 0.2) -> float:
        """The batch size whose steps exceed perfect scaling from `first` by `excess`.

        S(B) = (1 + q) S(B0) B0 / B with S B = S_min (B + B_crit) gives B + B_crit = (1 + q) (B0 + B_crit). Zhang et al. 2024
        (arXiv 2410.21676) call this the critical batch size, at q = 0.2 and B0 = 256.
        """
        return (1 + excess) * first + excess * self.critical


@dataclass(frozen=True, slots=True)
class Point:
    """One trial: the target took more than `lower` and at most `upper` steps. Equal bounds: exactly so many.

    A trial that is evaluated now and then is known up to an interval; one that missed, diverged or was stopped early at step s
    has the bounds (s, inf). `lower` may be 0. Steps may be in any unit that is the same for all trials.
    """

    batch: float
    lower: float
    upper: float

    @property
    def hit(self) -> bool:
        return math.isfinite(self.upper)
