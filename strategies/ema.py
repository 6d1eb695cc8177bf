"""Exponential moving average of the weights: a <- d a + (1 - d) w after each step, evaluated in place of w.

d = 2^(-1 / half-life). The half-life is stated in epochs, so that the average spans the same examples at every batch size
(d -> d^k when the batch grows k times: Busbridge et al. 2023, arXiv 2307.13813). Running statistics of batch norms, which
training left behind for other weights, are estimated anew over training examples before each evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.backprop import Update, amend
from strategies.contract import Batch, Clock, Need, Plan, State, Strategy, Worker, option
from strategies.parts.batch_norm import reestimate, statistics

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class Ema(Strategy):
    half_life: float = option(1.0, "epochs after which a weight's say has halved; 0: no averaging", ge=0)
    examples: int | None = option(
        1024,
        "training examples, at most, over which batch norms' statistics are estimated for the averaged weights; "
        "null: those that training left, for its own weights",
        ge=2,
    )

    def edit(self, plan: Plan) -> Plan:
        average = Average(self.half_life, self.examples if self.half_life else None)
        return plan.map(lambda phase: amend(phase, self, updates=(average,)))


@dataclass(frozen=True, slots=True)
class Live:
    net: Net
    worker: Worker
    own: Mapping[str, Tensor]  # the network's parameters
    estimates: bool  # whether there are statistics to estimate


@dataclass(frozen=True, slots=True)
class Average(Update):
    half_life: float
    examples: int | None = None
    needs = Need.LAYER_WEIGHTS

    def init(self, net: Net, worker: Worker) -> State:
        own, estimated = dict(net.named_parameters()), statistics(net) if self.examples else {}
        saved = {name: t.detach().clone() for name, t in (own | estimated).items()}
        return State(saved, Live(net, worker, own, bool(estimated)))

    def after(self, state: State, clock: Clock) -> None:
        import torch

        live: Live = state.live
        decay = 0.5 ** (clock.epochs_per_step / self.half_life) if self.half_life else 0.0
        averages = [state.saved[name] for name in live.own]
        with torch.no_grad():
            torch._foreach_lerp_(averages, list(live.own.values()), 1 - decay)

    def refresh(self, state: State, read: Callable[[int], Batch]) -> None:
        live: Live = state.live
        if self.examples and live.estimates:
            reestimate(live.net, read(self.examples).x, live.worker, state.saved)

    def weights(self, state: State) -> Mapping[str, Tensor]:
        return state.saved
