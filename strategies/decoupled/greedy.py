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
        for cut, part in enumerate(live.parts[:-1]):
            with live.worker.autocast():
                h = part(batch.x)
            if live.helpers:
                with live.worker.autocast():
                    loss = self._local(live.helpers[cut], h, batch, clock)  # type: ignore[arg-type]
                live.worker.backward(loss * weight)
                self.tell(state, f"loss_{live.net.ends[cut]}", loss.detach() * (len(batch) / clock.batch))
            batch = dataclasses.replace(batch, x=h.detach())
        with live.worker.autocast():
            loss = self.objective(live.parts[-1], batch, clock)
        live.worker.backward(loss * weight)
        return loss.detach()

    def _local(self, helper: Auxiliary, h: Tensor, batch: Batch, clock: Clock) -> Tensor:
        """() the loss of one module over the micro-batch."""
        pred, sim = SHARES[self.loss]
        losses = [pred * self.objective(helper.head, dataclasses.replace(batch, x=h), clock)] if pred else []
        losses += [sim * helper.dissimilarity(h, batch.y)] if sim else []
        return sum(losses[1:], losses[0])
