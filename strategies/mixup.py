"""Mixup: train on convex combinations of pairs of examples and of their labels (Zhang et al. 2018, arXiv 1710.09412).

x = l x_i + (1 - l) x_j, y likewise, with one l ~ Beta(alpha, alpha) per step. The partner of an example is the one that stands
one global batch further on in the shuffled stream: a random example, and the same one however the batch is shared out.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from strategies.contract import Batch, Clock, Plan, Schedule, Strategy, Stream, option
from strategies.parts.annealing import Anneal, falling
from strategies.parts.batch_maps import soft, with_map


@dataclass(frozen=True, slots=True)
class Mixup(Strategy):
    alpha: float = option(0.2, "both parameters of the Beta distribution of shares; 0: no mixing", ge=0)
    anneal: Anneal = option("none", "how alpha falls to 0 over each phase, if at all")

    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: with_map(phase, MixAhead(falling(self.alpha, self.anneal))))


@dataclass(frozen=True, slots=True)
class MixAhead:
    alpha: Schedule

    def __call__(self, batch: Batch, clock: Clock, stream: Stream) -> Batch:
        alpha = self.alpha(clock)
        if not alpha:
            return batch
        share = random.Random(clock.noise("mixup").initial_seed()).betavariate(alpha, alpha)
        partner = stream.ahead(clock.batch)
        x = batch.x.lerp(partner.x, 1 - share)
        own, others = (soft(y, stream.classes, x) for y in (batch.y, partner.y))
        return dataclasses.replace(batch, x=x, y=own.lerp(others, 1 - share))
