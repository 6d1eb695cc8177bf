"""How the strength of a smoothed loss falls over a phase: graduated optimisation. Shared by all that smooth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from strategies.contract import Clock
from strategies.rate import Constant, Cosine, Polynomial

Anneal: TypeAlias = Literal["none", "linear", "cosine"]
FALLS: dict[str, Constant | Cosine | Polynomial] = {"none": Constant(), "linear": Polynomial(), "cosine": Cosine()}


@dataclass(frozen=True, slots=True)
class Strength:
    """How strongly to smooth at each step of a phase."""

    full: float
    fall: Constant | Polynomial | Cosine

    def __call__(self, clock: Clock) -> float:
        return self.full * self.fall(clock.done)


def falling(full: float, anneal: Anneal) -> Strength:
    """From `full` to 0, or `full` throughout."""
    return Strength(full, FALLS[anneal])
