"""Max-change: no step moves a layer, or the whole network, further than a bound (Povey et al. 2015; Kaldi's nnet3)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from strategies.backprop import Update
from strategies.contract import Clock, Need, State, Worker

if TYPE_CHECKING:
    from torch import Tensor, nn

    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class MaxChange(Update):
    """Scales the step that the optimizer took, momentum and decay included, first layer by layer, then as a whole."""

    layer: float | None  # largest Euclidean norm of a layer's step
    total: float | None  # of the whole network's step, after that
    needs = Need.EDIT_WEIGHTS | Need.LAYER_WEIGHTS
    turn = 0  # others may change weights after it
    alone = True  # it looks at no other worker
    passes = True  # nor at how many passes were taken for a gradient

    def init(self, net: Net, worker: Worker) -> State:
        layers: dict[str, list[nn.Parameter]] = {}
        for name, p in net.named_parameters():
            if p.requires_grad:
                layers.setdefault(name.rpartition(".")[0], []).append(p)
        return State(live=Steps(list(layers.values())))

    def before(self, state: State, clock: Clock) -> None:
        state.live.remember()

    def after(self, state: State, clock: Clock) -> None:
        state.live.bound(self.layer or inf, self.total or inf)


@dataclass(slots=True)
class Steps:
    layers: list[list[nn.Parameter]]
    old: list[list[Tensor]] | None = None

    def remember(self) -> None:
        self.old = [[p.detach().clone() for p in layer] for layer in self.layers]

    def bound(self, layer: float, total: float) -> None:
        import torch

        assert self.old is not None
        with torch.no_grad():
            norms = torch.stack([_distance(a, b) for a, b in zip(self.layers, self.old, strict=True)])
            scales = (layer / norms).clamp(max=1.0)
            scales *= (total / (scales * norms).norm()).clamp(max=1.0)
            for own, old, scale in zip(self.layers, self.old, scales.tolist(), strict=True):
                if scale < 1:
                    _shorten(own, old, scale)
        self.old = None


def _shorten(own: list[nn.Parameter], old: list[Tensor], scale: float) -> None:
    for p, q in zip(own, old, strict=True):
        p.sub_((p - q) * (1 - scale))


def _distance(a: list[nn.Parameter], b: list[Tensor]) -> Tensor:
    import torch

    return torch.stack([(p - q).norm() for p, q in zip(a, b, strict=True)]).norm().double()
