"""Post-local SGD: late in training workers step alone and average their weights (Lin et al. 2018, arXiv 1808.07217).

Up to `start`, gradients are averaged at each step. From then on each of W workers steps on the gradient of its own share of the
batch, and weights are averaged after every `period` steps and after the last. Momentum stays each worker's own. Rows show
the mean of all workers' weights, and training goes on from each worker's own, so that logging changes nothing; for that,
each row costs every worker memory and traffic of all workers' weights and momentum, so keep rows far apart on many workers.
Running statistics of batch norms are each worker's own while workers step alone, and their mean from each row on.
Those of `ghost_batch_norm` too, whichever its `statistics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.contract import Phase, Plan, Strategy, option
from strategies.parts.local_steps import LocalSteps, stepping_alone


@dataclass(frozen=True, slots=True)
class PostLocalSgd(Strategy):
    parts_matter: ClassVar[bool] = True
    start: float = option(0.5, "share of the phase after which workers step alone; 1: never", ge=0, le=1)
    period: int = option(16, "steps between averages of the weights; 1: synchronous SGD", ge=1)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        return stepping_alone(phase, self, LocalSteps, start=self.start, period=self.period)
