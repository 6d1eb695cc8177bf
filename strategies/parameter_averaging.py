"""Parameter averaging: workers train alone from the first step on, and average their parameters in rounds.

Each of W workers takes SGD steps on its share of each batch; after every `examples` of its own, a round, parameters are
averaged and all go on from the mean (Povey, Zhang & Khudanpur 2015, arXiv 1410.7455, section 3, with `ng_sgd` on each worker,
whose factors are its own within a round). After the first round the best worker's parameters are taken instead, by the mean
training loss of the round, since averages of young networks may be worse than either.

The rate is that of the mean gradient of a worker's share: what the authors write as W times the effective rate of the summed
gradient. So one step per round with plain SGD is synchronous SGD at the same rate, and weight decay needs no factor of 1 / W.

Of the authors' scheme (Kaldi's nnet3), three parts are not here: a number of workers that grows; half the batch, and the
largest change divided by sqrt(2), in the first round; and the end, which combines up to 20 late models by weights that are
optimised on training examples. The result is the mean after the last round.

From `post_local_sgd` this differs as a whole way of training does from a finish: there, workers step together first and alone
late, rounds are a few steps, and each keeps its momentum; here, they step alone throughout, rounds are stated in examples and
are long, and what else workers have learnt - momentum, curvature - is joined with the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, inf
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from strategies.contract import Batch, Clock, Phase, Plan, State, Strategy, Worker, option
from strategies.parts.local_steps import LocalSteps, stepping_alone
from strategies.parts.replicas import average_, copy_, gathered, tensors_in

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class ParameterAveraging(Strategy):
    parts_matter: ClassVar[bool] = True
    examples: int = option(25000, "training examples of each worker in a round, rounded up to whole steps", ge=1)
    steps: int | None = option(None, "steps of a round, instead of examples; 1 with plain SGD: synchronous SGD", ge=1)
    first: Literal["best", "average"] = option(
        "best", "what the first round ends in: the parameters of the worker with the least training loss, or their mean"
    )
    momentum: Literal["average", "reset", "own"] = option(
        "average", "the optimizer's memory after a round: averaged too, set to zero, or left as each worker has it"
    )
    merge_factors: bool = option(True, "curvature factors are merged after a round, else left as each worker has them")

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._amend)

    def _amend(self, phase: Phase) -> Phase:
        return stepping_alone(phase, self, Rounds, start=0.0, period=self.steps or 0, options=self)


Share: TypeAlias = "Callable[[Sequence[Tensor], Worker], None]"
"""Makes tensors alike on all workers, in place."""


@runtime_checkable
class Merges(Protocol):
    """An update that learns something of the data, which workers can merge."""

    def merge(self, state: State, worker: Worker) -> None:
        """What the state holds becomes that of all workers, alike on each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds(LocalSteps):
    options: ParameterAveraging

    def init(self, net: Net, worker: Worker) -> State:
        import torch

        state = LocalSteps.init(self, net, worker)
        tally = torch.zeros(2, dtype=torch.float64, device=worker.device)  # this round's losses, and how many examples
        state.saved |= {"rounds": 0, "tally": tally}
        return state

    def _micro(self, state: State, batch: Batch, clock: Clock, last: bool) -> Tensor:
        loss = LocalSteps._micro(self, state, batch, clock, last)
        state.saved["tally"] += loss.new_tensor([clock.batch, 0.0]) * loss + loss.new_tensor([0.0, len(batch)])
        return loss

    def own(self, state: State) -> list[Tensor]:
        return [*LocalSteps.own(self, state), state.saved["tally"]]

    def between(self, state: State, clock: Clock) -> int:
        return self.period or ceil(self.options.examples * state.live.worker.size / clock.batch)

    def join(self, state: State) -> None:
        """The end of a round."""
        worker, best = state.live.worker, self.options.first == "best" and not state.saved["rounds"]
        share = partial(copy_, rank=best_of(state.saved["tally"], worker)) if best else average_
        share(list(state.live.net.parameters()), worker)
        self._join_memory(list(tensors_in(state.live.optimizer.state_dict())), worker, share)
        if self.options.merge_factors:
            for update, own in zip(self.updates, state.saved["updates"], strict=True):
                if isinstance(update, Merges):
                    share(list(tensors_in(own.saved)), worker) if best else update.merge(own, worker)
        state.saved["rounds"] += 1
        state.saved["tally"].zero_()

    def _join_memory(self, memory: list[Tensor], worker: Worker, share: Share) -> None:
        if self.options.momentum == "average":
            share(memory, worker)
        elif self.options.momentum == "reset":
            for t in memory:
                t.zero_()


def best_of(tally: Tensor, worker: Worker) -> int:
    """The rank with the least mean loss (losses, examples), the first of equals; a loss that is not finite is the worst."""
    (table,) = gathered([tally], worker)
    return int((table[:, 0] / table[:, 1]).nan_to_num(nan=inf).argmin())
