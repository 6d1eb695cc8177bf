"""Local losses: modules learn at the same time, each from a small network of its own, and send nothing back.

Decoupled greedy learning (Belilovsky, Eickenberg & Oyallon 2020, arXiv 1901.08164) and local error signals (Nokland & Eidnes
2019, arXiv 1901.06656). The network is cut into modules; the last one has the network's own loss. Below it, with h what a
module makes and C(z) the cosines between all examples of a micro-batch,

    pred: the objective of auxiliary logits;   sim: mean (C(features of h) - C(labels))^2;   predsim: 0.01 pred + 0.99 sim.

`none`: modules below the last stay as they are made, the baseline that every decoupled method has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from strategies.contract import Phase, Plan, PlanError, Strategy, option
from strategies.decoupled.greedy import Greedy
from strategies.decoupled.learner import decouple, with_roles


@dataclass(frozen=True, slots=True)
class LocalLoss(Strategy):
    parts_matter: ClassVar[bool] = True  # similarities are taken within a micro-batch
    cuts: list[int] | None = option(
        None,
        "stages behind which the network is cut; []: not at all; none: behind each that has parameters, but the last",
    )
    loss: Literal["pred", "sim", "predsim", "none"] = option(
        "pred", "of modules below the last: of auxiliary logits, of similarities, of both, or none: they do not learn"
    )
    head: Literal["linear", "pooled", "deep"] | None = option(
        None,
        "that makes the logits: linear; averaged over the image, then linear; deep: three 1x1 convolutions on smaller images, "
        "then three linear layers; none: pooled",
    )
    ahead: int | None = option(
        None,
        "modules on workers of their own, each at most so many batches ahead of the next: `cluster.workers` is a multiple of "
        "the modules; none: all modules on each worker",
        ge=0,
    )
    bf16_messages: bool = option(False, "with `ahead`: activations are sent rounded to bf16")

    def __post_init__(self) -> None:
        Strategy.__post_init__(self)
        if self.head is not None and self.loss in ("sim", "none"):
            raise PlanError(f"LocalLoss: loss: {self.loss} has no head that makes logits: leave out `head`")

    def edit(self, plan: Plan) -> Plan:
        plan = plan if self.ahead is None else with_roles(plan, self, self.cuts)
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        how = {"ahead": self.ahead, "bf16_messages": self.bf16_messages}
        return decouple(phase, self, self.cuts, Greedy, loss=self.loss, head=self.head or "pooled", **how)
