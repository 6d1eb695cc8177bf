"""One case per strategy for the laws: a setting that acts, and the neutral one that must equal the baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from strategies.backprop import amend
from strategies.contract import ModelSpec, Phase, Plan
from strategies.net import Net
from strategies.optimizers import AdamW
from strategies.rate import Rate, Steps


def as_it_is(plan: Plan) -> Plan:
    return plan


def with_adamw(plan: Plan) -> Plan:
    def change(phase: Phase) -> Phase:
        return amend(phase, plan, optimizer=lambda old: AdamW(weight_decay=1e-2))

    return plan.map(change)


def with_step_decay(plan: Plan) -> Plan:
    rate = Rate(0.1, warmup=0.5, decay=Steps((0.5,), 0.5))
    return plan.map(lambda phase: amend(phase, plan, rate=lambda old: rate))


def normalised_net(inputs: tuple[int, ...], classes: int) -> Net:
    stage = nn.Sequential(nn.Linear(inputs[0], 8), nn.BatchNorm1d(8), nn.Tanh())
    return Net([stage], head=nn.Linear(8, classes))


def with_batch_norm(plan: Plan) -> Plan:
    return plan.map(lambda phase: dataclasses.replace(phase, model=ModelSpec(normalised_net)))


@dataclass(frozen=True)
class Case:
    acts: dict[str, Any]  # options under which the method changes the result
    neutral: dict[str, Any]  # options under which it must not
    base: Callable[[Plan], Plan] = as_it_is  # makes of the usual baseline the one that the method works on
    micro: int = 64  # examples per forward pass where a law does not say otherwise: whole batches
    micro_batches: tuple[tuple[int, int], ...] = ((12, 5), (11, 4))  # law 2: (batch, micro-batch); 12 = 4 + 4 + 4
    shares: tuple[tuple[int, int], ...] = ((12, 2), (11, 2))  # law 3: the same; 11: shares of 5 and 6
    measures: bool = False  # logs, and changes nothing
    repeats: bool = True  # law 8; not where the examples of a batch are normalised together


CASES: dict[str, Case] = {
    "adascale": Case(
        acts={"per": 3},
        neutral={"per": 12},
        micro=6,
        micro_batches=(),  # the gain is estimated from parts of a batch, so it depends on them
        shares=((12, 6), (11, 6)),  # with the same parts, who holds them does not matter
        repeats=False,  # twice the batch is twice the scale
    ),
    "batch_growth": Case(acts={}, neutral={"largest": 1}, base=with_step_decay),
    "ema": Case(acts={"half_life": 0.5}, neutral={"half_life": 0.0}),
    "ghost_batch_norm": Case(
        acts={"size": 3},
        neutral={"size": 1000},
        base=with_batch_norm,
        micro_batches=((12, 6), (12, 3)),  # parts are those of the whole batch where bounds coincide
        shares=((12, 3),),
        repeats=False,
    ),
    "gradient_clipping": Case(acts={"norm": 0.05}, neutral={"norm": 1e9}),
    "label_smoothing": Case(acts={"amount": 0.2}, neutral={"amount": 0.0}),
    "lamb": Case(acts={}, neutral={"trust": False}, base=with_adamw),
    "lars": Case(acts={"trust": 0.1}, neutral={"trust": 0.0, "form": "torch"}),
    "mixup": Case(acts={"alpha": 0.4}, neutral={"alpha": 0.0}),
    "muon": Case(acts={"rate": 0.5}, neutral={"smallest": 1000}),
    "noise_scale": Case(acts={}, neutral={}, micro=6, measures=True),
    "swa": Case(acts={"start": 0.5}, neutral={"start": 1.0}),
}
