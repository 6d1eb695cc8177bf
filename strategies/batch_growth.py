"""Grow the batch instead of decaying the rate (Smith, Kindermans, Ying & Le 2018, arXiv 1711.00489).

Where a step schedule multiplies the rate by f, the batch is divided by f and the rate stays: rate / (batch (1 - momentum)), the
scale of the noise, is that of the schedule at every epoch, in fewer steps on the same examples. Beyond `largest`, and for what
rounding a batch to whole examples leaves, the rate changes. Each stretch is a phase; the learner's state goes on through all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from strategies.backprop import Update, amend
from strategies.contract import Phase, Plan, PlanError, Strategy, keep, option
from strategies.rate import Rate, Steps


@dataclass(frozen=True, slots=True)
class BatchGrowth(Strategy):
    largest: int | None = option(None, "largest global batch; none: no limit", ge=1)

    def edit(self, plan: Plan) -> Plan:
        return dataclasses.replace(plan, phases=tuple(new for old in plan.phases for new in self._grown(old)))

    def _grown(self, phase: Phase) -> tuple[Phase, ...]:
        learner: Any = amend(phase, self).learner
        rate = learner.rate
        if any(type(update).rate is not Update.rate for update in learner.updates):
            raise PlanError("batch_growth and adascale both set the rate by the batch size: leave one of the two out")
        if not (isinstance(rate, Rate) and isinstance(rate.decay, Steps)):
            raise PlanError(
                f"batch_growth takes the place of a step decay, but the rate is {rate}: write `decay: step`"
            )
        if self.largest is not None and self.largest <= phase.batch:
            return (phase,)
        parts = list(stretches(rate, phase.epochs, phase.batch, self.largest))
        return tuple(_stretch(phase, part, n, last=part is parts[-1]) for n, part in enumerate(parts))


@dataclass(frozen=True, slots=True)
class Stretch:
    epochs: float
    batch: int
    rate: Rate


def stretches(rate: Rate, epochs: float, batch: int, largest: int | None = None) -> Iterator[Stretch]:
    """A step schedule over `epochs` at one batch size, as stretches of one batch and one peak each."""
    assert isinstance(rate.decay, Steps)
    factor, shares = rate.decay.factor, sorted(rate.decay.at)
    bounds = [0.0, *(rate.warmup + share * (epochs - rate.warmup) for share in shares), epochs]
    for drops, (begin, end) in enumerate(pairwise(bounds)):
        grown = min(round(batch / factor**drops), largest or round(batch / factor**drops))
        peak = rate.peak * (factor**drops * grown / batch)
        yield Stretch(end - begin, grown, Rate(peak, *((rate.warmup, rate.start) if drops == 0 else ())))


def _stretch(phase: Phase, part: Stretch, number: int, last: bool) -> Phase:
    return dataclasses.replace(
        amend(phase, part, rate=lambda old: part.rate),
        name=f"{phase.name} {number + 1}",
        epochs=part.epochs,
        batch=part.batch,
        carry=keep if number else phase.carry,
        hands_on=phase.hands_on or not last,
    )
