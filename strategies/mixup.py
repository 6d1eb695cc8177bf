"""Mixup: train on convex combinations of pairs of examples and of their labels (Zhang et al. 2018, arXiv 1710.09412).

x = l x_i + (1 - l) x_j, y likewise, with one l ~ Beta(alpha, alpha) per step. The partner of an example is the one that stands
one global batch further on in the shuffled stream: a random example, and the same one however the batch is shared out.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from strategies.contract import Batch, Clock, Plan, Strategy, Stream, option
from strategies.parts.batch_maps import soft, with_map


@dataclass(frozen=True, slots=True)
class Mixup(Strategy):
    alpha: float = option(0.2, "both parameters of the Beta distribution of shares; 0: no mixing", ge=0)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: with_map(phase, MixAhead(self.alpha)))


@dataclass(frozen=True, slots=True)
class MixAhead:
    alpha: float

    def __call__(self, batch: Batch, clock: Clock, stream: Stream) -> Batch:
        if not self.alpha:
            return batch
        share = random.Random(clock.noise("mixup").initial_seed()).betavariate(self.alpha, self.alpha)
        partner = stream.ahead(clock.batch)
        x = batch.x.lerp(partner.x, 1 - share)
        own, others = (soft(y, stream.classes, x) for y in (batch.y, partner.y))
        return dataclasses.replace(batch, x=x, y=own.lerp(others, 1 - share))
