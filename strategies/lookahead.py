"""Lookahead: every k steps slow weights go a part of the way to the fast ones, which go on from there.

s <- s + a (w - s); w <- s (Zhang, Lucas, Hinton & Ba 2019, arXiv 1907.08610). The part a may shrink from 1 to `alpha` over the
run: a = 1 - (1 - alpha) p^power at the share p of the steps (power 3 in Jordan 2024, arXiv 2404.00498). Slow weights are
evaluated and kept. Running statistics follow the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.backprop import Update, amend
from strategies.contract import Clock, Need, Plan, State, Strategy, Worker, option

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class Lookahead(Strategy):
    every: int = option(5, "optimizer steps between moves of the slow weights", ge=1)
    alpha: float = option(0.5, "part of the way that slow weights go, at the end of the run; 1: all of it", gt=0, le=1)
    power: float = option(0.0, "how late the part shrinks from 1 to `alpha`; 0: it is `alpha` throughout", ge=0)

    def edit(self, plan: Plan) -> Plan:
        slow = SlowWeights(self.every, self.alpha, self.power)
        return plan.map(lambda phase: amend(phase, self, updates=(slow,)))


@dataclass(frozen=True, slots=True)
class SlowWeights(Update):
    every: int
    alpha: float
    power: float
    needs = Need.EDIT_WEIGHTS | Need.LAYER_WEIGHTS

    def init(self, net: Net, worker: Worker) -> State:
        own = {name: t for name, t in net.state_dict(keep_vars=True).items() if t.is_floating_point()}
        statistics = [t for name, t in net.named_buffers() if name in own]
        return State({name: t.detach().clone() for name, t in own.items()}, live=(own, statistics, worker))

    def after(self, state: State, clock: Clock) -> None:
        import torch

        if (clock.step + 1) % self.every:
            return
        own, statistics, worker = state.live
        slow, fast = [state.saved[name] for name in own], list(own.values())
        with torch.no_grad():
            _average(statistics, worker)
            torch._foreach_lerp_(slow, fast, self.part((clock.step + 1) / clock.steps))
            torch._foreach_copy_(fast, slow)

    def part(self, done: float) -> float:
        return 1 - (1 - self.alpha) * done**self.power

    def weights(self, state: State) -> Mapping[str, Tensor]:
        return state.saved


def _average(statistics: list[Tensor], worker: Worker) -> None:
    """Each worker's running statistics become the mean over workers: slow ones are alike on all, as weights are."""
    import torch

    if worker.size > 1 and statistics:
        mean = worker.sum_(torch.cat([t.flatten() for t in statistics])) / worker.size
        parts = mean.split([t.numel() for t in statistics])
        torch._foreach_copy_(statistics, [part.view_as(t) for part, t in zip(parts, statistics, strict=True)])
