"""Label smoothing: the target is (1 - a) onehot + a / classes (Szegedy et al. 2016, arXiv 1512.00567, section 7)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from strategies.backprop import CrossEntropy, amend
from strategies.contract import Objective, Phase, Plan, PlanError, Strategy, option


@dataclass(frozen=True, slots=True)
class LabelSmoothing(Strategy):
    amount: float = option(0.1, "share of each label that is spread evenly over all classes", ge=0, lt=1)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._smooth)

    def _smooth(self, phase: Phase) -> Phase:
        return amend(phase, self, objective=self._objective)

    def _objective(self, old: Objective) -> Objective:
        if not isinstance(old, CrossEntropy):
            raise PlanError(
                f"label_smoothing smooths cross-entropy, but the objective is {old}: leave one of the two out"
            )
        return dataclasses.replace(old, smoothing=self.amount)
