"""Pipeline parallelism: modules on workers of their own, each at another micro-batch of the same step.

GPipe (Huang et al. 2019, arXiv 1811.06965): with K modules and M micro-batches, all pass forward, then all backward, and then
all modules move. It is backpropagation, to rounding, and the baseline of every method in which modules do not wait for each
other: here they do, for a share (K-1)/(M+K-1) of a step where they take equally long.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.contract import Phase, Plan, Strategy, option
from strategies.decoupled.learner import decouple, with_roles
from strategies.decoupled.pipelined import Pipelined


@dataclass(frozen=True, slots=True)
class Pipeline(Strategy):
    cuts: list[int] | None = option(
        None,
        "stages behind which the network is cut; []: not at all; none: behind each that has parameters, but the last",
    )
    micro_batches: int = option(4, "parts of what a forward pass would take at once, which follow each other", ge=1)
    roles: bool = option(
        True,
        "each module on workers of its own: `cluster.workers` is a multiple of the modules; else all modules on each "
        "worker, which is backpropagation in micro-batches",
    )
    bf16_messages: bool = option(False, "with roles: activations and gradients are sent rounded to bf16")

    def edit(self, plan: Plan) -> Plan:
        plan = with_roles(plan, self, self.cuts) if self.roles else plan
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        how = {"ahead": 1 if self.roles else None, "bf16_messages": self.bf16_messages}
        return decouple(phase, self, self.cuts, Pipelined, micro_batches=self.micro_batches, **how)
