"""Delayed gradients: modules work on several batches at once, and what comes back to them is some steps old.

The network is cut into K modules, counted from 0. Each moves at every step, by the gradient of

    ddg: a batch of K-1-k steps ago, at the weights of that time (Huo, Gu, Yang & Huang 2018, arXiv 1804.10574);
    fr:  the same batch, passed forward again at the weights of now (features replay: Huo, Gu & Huang 2018, arXiv 1807.04511);
    fdg: forward passes are spread out too: the batch passed 2(K-1-k) steps ago, at the weights of that time, and what is sent
         back is multiplied by `shrink` at each cut (Zhuang et al. 2020, arXiv 1906.09108).

In the first steps, modules to which nothing has come back yet stay. With one module, each is backpropagation. With `ahead`,
each module has workers of its own: these delays are what lets them work at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from strategies.contract import Phase, Plan, Strategy, option
from strategies.decoupled.delayed import Delayed
from strategies.decoupled.learner import decouple, with_roles


@dataclass(frozen=True, slots=True)
class DelayedGradient(Strategy):
    cuts: list[int] | None = option(
        None,
        "stages behind which the network is cut; []: not at all; none: behind each that has parameters, but the last",
    )
    variant: Literal["ddg", "fr", "fdg"] = option(
        "fr",
        "ddg: forward together, gradients at old weights; fr: likewise, at new weights; fdg: all apart, old weights",
    )
    shrink: float = option(1.0, "factor at each cut of what is sent back; fdg's authors take 0.2 to 1", gt=0, le=1)

    ahead: int | None = option(
        None,
        "modules on workers of their own, with messages of at most so many batches on their way to each neighbour: "
        "`cluster.workers` is a multiple of the modules; none: all modules on each worker",
        ge=0,
    )
    bf16_messages: bool = option(False, "with `ahead`: activations and gradients are sent rounded to bf16")

    def edit(self, plan: Plan) -> Plan:
        plan = plan if self.ahead is None else with_roles(plan, self, self.cuts)
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        what = {"apart": self.variant == "fdg", "replay": self.variant == "fr", "shrink": self.shrink}
        how = {"ahead": self.ahead, "bf16_messages": self.bf16_messages}
        return decouple(phase, self, self.cuts, Delayed, **what, **how)
