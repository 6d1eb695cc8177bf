"""One case per strategy for the laws: a setting that acts, and the neutral one that must equal the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from strategies.backprop import amend
from strategies.contract import Phase, Plan
from strategies.optimizers import AdamW


def as_it_is(plan: Plan) -> Plan:
    return plan


def with_adamw(plan: Plan) -> Plan:
    def change(phase: Phase) -> Phase:
        return amend(phase, plan, optimizer=lambda old: AdamW(weight_decay=1e-2))

    return plan.map(change)


@dataclass(frozen=True)
class Case:
    acts: dict[str, Any]  # options under which the method changes the result
    neutral: dict[str, Any]  # options under which it must not
    base: Callable[[Plan], Plan] = as_it_is  # makes of the usual baseline the one that the method works on
    micro_batches: tuple[tuple[int, int], ...] = ((12, 5), (11, 4))  # law 2: (batch, micro-batch); 12 = 4 + 4 + 4
    shares: tuple[tuple[int, int], ...] = ((12, 2), (11, 2))  # law 3: the same; 11: shares of 5 and 6
    repeats: bool = True  # law 8; not where the examples of a batch are normalised together


CASES: dict[str, Case] = {
    "ema": Case(acts={"half_life": 0.5}, neutral={"half_life": 0.0}),
    "gradient_clipping": Case(acts={"norm": 0.05}, neutral={"norm": 1e9}),
    "label_smoothing": Case(acts={"amount": 0.2}, neutral={"amount": 0.0}),
    "lamb": Case(acts={}, neutral={"trust": False}, base=with_adamw),
    "lars": Case(acts={"trust": 0.1}, neutral={"trust": 0.0, "form": "torch"}),
}
