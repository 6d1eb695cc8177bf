"""SOAP: Adam in the slowly turning eigenbases of Shampoo's statistics (Vyas et al. 2024, arXiv 2409.11321).

For a weight matrix: G' = Ql' G Qr; AdamW's moments, the second of G', give the step, which is turned back. Ql and Qr are
eigenvectors of the running means of G G' and G'G: at first of the first gradient, which is used for nothing else; then, every
so many steps, one step of power iteration, Q <- qr(mean Q), ordered by eigenvalue with the second moment alike. Betas, eps and
decay are AdamW's, which keeps biases and norm parameters. Convolutions count as matrices with a row per output channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.backprop import amend
from strategies.contract import Plan, PlanError, Strategy, option
from strategies.optimizers import AdamW, groups
from strategies.parts.layers import WholeLayers

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class Soap(Strategy):
    beta: float = option(0.95, "share of the old statistics that stays at each step", ge=0, lt=1)
    every: int = option(10, "optimizer steps between turns of the eigenbases", ge=1)
    largest: int = option(1024, "side of a matrix up to which it is turned; 1: plain AdamW", ge=1)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(lambda phase: amend(phase, self, updates=(WholeLayers(),), optimizer=self._optimizer))

    def _optimizer(self, old: object) -> SoapAndAdamW:
        if not isinstance(old, AdamW):
            raise PlanError(f"soap turns the moments of adamw, but the optimizer is {old}: write `optimizer: adamw`")
        return SoapAndAdamW(old, self)


@dataclass(frozen=True, slots=True)
class SoapAndAdamW:
    base: AdamW
    options: Soap

    def __call__(self, net: Net) -> Optimizer:
        from strategies.parts.joint_optimizer import JointOptimizer, without
        from strategies.parts.soap_optimizer import SoapMatrices

        base, o = self.base, self.options
        matrices = [group for group in groups(net, base.weight_decay, adaptive=True) if group["params"][0].ndim >= 2]
        if not matrices:
            raise PlanError("soap turns weight matrices, but the network has none: use another method")
        soap = SoapMatrices(matrices, (base.beta1, base.beta2), base.eps, o.beta, o.every, o.largest)
        return JointOptimizer(soap, without(base(net), [p for group in matrices for p in group["params"]]))
