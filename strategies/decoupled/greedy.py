"""The learner of `local_loss`: each module descends a loss of its own, and nothing comes back over a cut."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from strategies.contract import Batch, Clock, State
from strategies.decoupled.learner import Decoupled, DecoupledLive

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.decoupled.auxiliary import Auxiliary, Head
    from strategies.decoupled.boundary import CutNet

Loss: TypeAlias = Literal["pred", "sim", "predsim", "none"]
SHARES: dict[str, tuple[float, float]] = {"pred": (1.0, 0.0), "sim": (0.0, 1.0), "predsim": (0.01, 0.99)}
"""Of the objective with the auxiliary head's logits, and of the dissimilarity, in a module's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy(Decoupled):
    """All modules learn from one batch at the same time; the last one from the objective itself."""

    loss: Loss
    head: Head

    def helpers(self, net: CutNet) -> list[Any]:
        from strategies.decoupled.auxiliary import Auxiliary

        if self.loss == "none":
            return []
        pred, sim = SHARES[self.loss]
        return [Auxiliary(shape, net.classes, self.head if pred else None, bool(sim)) for shape in net.shapes]

    def exchange(self, state: State, batch: Batch, clock: Clock, weight: float) -> Tensor:
        live: DecoupledLive = state.live
        for number in live.own:
            if live.line and number:
                batch = dataclasses.replace(batch, x=live.line.take())
            if number == len(live.parts) - 1:
                return self.top(state, batch, clock, weight)
            batch = dataclasses.replace(batch, x=self._below(state, number, batch, clock, weight))
        return batch.x.new_zeros(())

    def _below(self, state: State, number: int, batch: Batch, clock: Clock, weight: float) -> Tensor:
        """What a module below the last makes; it goes on its way before the module learns."""
        live: DecoupledLive = state.live
        with live.worker.autocast():
            h: Tensor = live.parts[number](batch.x)
        if live.line:
            live.line.send(h, number + 1)
        if live.helpers:
            with live.worker.autocast():
                loss = self._local(live.helpers[number], h, batch, clock)  # type: ignore[arg-type]
            live.worker.backward(loss * weight)
            self.tell(state, f"loss_{live.net.ends[number]}", loss.detach() * (len(batch) / clock.batch))
        return h.detach()

    def names(self, live: DecoupledLive) -> list[str]:
        return [f"loss_{end}" for end in live.net.ends if live.helpers]

    def _local(self, helper: Auxiliary, h: Tensor, batch: Batch, clock: Clock) -> Tensor:
        """() the loss of one module over the micro-batch."""
        pred, sim = SHARES[self.loss]
        losses = [pred * self.objective(helper.head, dataclasses.replace(batch, x=h), clock)] if pred else []
        losses += [sim * helper.dissimilarity(h, batch.y)] if sim else []
        return sum(losses[1:], losses[0])
