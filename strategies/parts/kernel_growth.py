"""Weights of a network with small kernels, and what learners keep beside them, resampled for the one with large kernels.

A kernel of a x a taps that becomes one of b x b is interpolated between tap centres, and multiplied by an amplitude c. With
c = (a / b)^2 the response to an image enlarged b / a times is the old response, enlarged. In front of a norm the scale of
the weights is free, and c = a / b keeps their size. Gradients are cotangents: they become (a / b)^2 / c times the
interpolated ones. The rate that takes the same steps is c^2 (b / a)^2 times the old one; of optimizers that divide gradients
by their size, c times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from strategies.contract import PlanError, State, Weights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from strategies.net import Net

Amplitude: TypeAlias = Literal["auto", "kernel_ratio"]
Interpolation: TypeAlias = Literal["bilinear", "bicubic", "nearest", "moments"]
POWERS = {"momentum_buffer": 1, "exp_avg": 1, "mean": 1, "exp_avg_sq": 2, "square": 2}
"""How often the gradient enters what an optimizer keeps per weight."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How one weight is resampled."""

    before: tuple[int, ...]  # its shape as a kernel, (rows, channels, h, w): a flattened map's weights are one, too
    sides: tuple[int, int]  # (h, w) afterwards
    shape: tuple[int, ...]  # of the weight afterwards
    mode: Interpolation
    normed: bool  # amplitude a / b instead of (a / b)^2

    @property
    def area(self) -> float:
        return math.prod(self.before[2:]) / math.prod(self.sides)

    @property
    def amplitude(self) -> float:
        return math.sqrt(self.area) if self.normed else self.area

    @property
    def gradient(self) -> float:
        """The factor of interpolated gradients."""
        return self.area / self.amplitude

    @property
    def rate(self) -> float:
        """The factor of the learning rate: amplitude / gradient."""
        return 1.0 if self.normed else self.area

    def resample(self, t: Tensor, factor: float) -> Tensor:
        """`t`, of the weight's shape before, interpolated and times `factor`."""
        return interpolated(t.reshape(self.before), self.sides, self.mode).mul_(factor).reshape(self.shape)


def interpolated(kernels: Tensor, sides: tuple[int, int], mode: Interpolation) -> Tensor:
    """(rows, channels, h, w) -> (rows, channels, *sides), between centres of taps ("half-pixel"), without a factor."""
    from torch.nn.functional import interpolate

    if mode == "moments":
        down, across = (dilated(a, b, b / a) * (b / a) for a, b in zip(kernels.shape[2:], sides, strict=True))
        return down.to(kernels) @ kernels @ across.to(kernels).mT
    return interpolate(kernels, sides, mode=mode, **({} if mode == "nearest" else {"align_corners": False}))


def dilated(taps: int, grown: int, ratio: float) -> Tensor:
    """(grown, taps) float64: makes of a row of taps the shortest one with the moments of the row stretched by `ratio`.

    To polynomials of degrees below `taps` it responds as the old row did before the image was enlarged. With 3 taps that stay
    3 this is how a stencil is taken to a finer mesh (after Haber, Ruthotto & Holtham 2018, arXiv 1703.02009).
    """
    import torch

    powers = torch.arange(taps, dtype=torch.float64).view(-1, 1)
    old, new = ((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) ** powers for n in (taps, grown))
    return torch.linalg.pinv(new) @ (ratio**powers * old)


@dataclass(frozen=True, slots=True)
class Grow:
    """The carry into a network with larger kernels. What has the same shape in both is kept as it is."""

    mode: Interpolation = "bilinear"
    amplitude: Amplitude = "auto"

    def __call__(self, old: Weights, net: Net) -> None:
        net.load_state_dict(self.weights(old, self.growths(old, net)))

    def weights(self, old: Weights, growths: Mapping[str, Growth]) -> dict[str, Tensor]:
        return {k: g.resample(t, g.amplitude) if (g := growths.get(k)) else t for k, t in old.items()}

    def growths(self, old: Weights, net: Net) -> dict[str, Growth]:
        """By name, the weights whose shapes differ. Raises PlanError if one is not of a convolution or a flattened map."""
        new = net.state_dict()
        different = {name for name, t in new.items() if t.shape != old[name].shape}
        kernels = {f"{name}.weight": (layer, channels, normed) for name, layer, channels, normed in layers(net)}
        strange = sorted(different - kernels.keys())
        if strange:
            raise PlanError(
                f"kernel_rescale resamples convolutions and layers behind a flattened map, not {strange[0]}"
            )
        return {name: self._growth(name, old[name], *kernels[name]) for name in sorted(different)}

    def _growth(self, name: str, old: Tensor, layer: Any, channels: int, normed: bool) -> Growth:
        before, after = (as_kernel(name, tuple(t.shape), channels) for t in (old, layer.weight))
        normed = normed and self.amplitude == "auto"
        return Growth(before, (after[2], after[3]), tuple(layer.weight.shape), self.mode, normed)

    def state(self, old: dict[str, Any], new: State) -> dict[str, Any]:
        """The content of the old learner's state, made fit for the learner of the network with larger kernels.

        Weights as in the carry; what optimizers keep as gradients; averages of weights, kept under their names, as weights.
        What else has another shape is made anew, with all that it is kept with.
        """
        growths = self.growths(old["net"], new.live.net)
        fresh = {key: plain(value) for key, value in new.saved.items()}
        return fresh | {
            "net": self.weights(old["net"], growths),
            "optimizer": optimizer_state(old, new, growths),
            "updates": fit(old["updates"], new.saved["updates"], growths),
        }


def as_kernel(name: str, shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """(rows, channels, h, w) of a kernel, or of a matrix behind a square map of `channels`. Raises PlanError if it isn't."""
    if len(shape) == 4:
        return shape
    side = math.isqrt(shape[1] // channels) if channels else 0
    if not side or channels * side * side != shape[1]:
        raise PlanError(f"kernel_rescale resamples layers behind square maps, but {name} has {shape[1]} inputs")
    return shape[0], channels, side, side


def layers(net: nn.Module) -> Iterator[tuple[str, nn.Module, int, bool]]:
    """(name, layer, channels of the last convolution before it, whether its scale is free) of convolutions and linear layers.

    The scale is free in front of a norm over whole channels, or of any norm if there is no bias to be scaled alike; pooling
    in between changes nothing.
    """
    from torch import nn

    leaves = [(name, m) for name, m in net.named_modules() if not list(m.children()) and not passes(m)]
    channels = 0
    for n, (name, layer) in enumerate(leaves):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            following = leaves[n + 1][1] if n + 1 < len(leaves) else None
            yield name, layer, channels, frees(following, layer.bias is not None)
        if isinstance(layer, nn.Conv2d):
            channels = layer.out_channels


def passes(module: nn.Module) -> bool:
    """Whether the scale of its inputs passes through a layer without parameters."""
    from torch import nn

    return isinstance(module, nn.MaxPool2d | nn.AvgPool2d | nn.Identity | nn.Dropout)


def frees(norm: nn.Module | None, biased: bool) -> bool:
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(norm, _BatchNorm) or (isinstance(norm, nn.GroupNorm | nn.LayerNorm) and not biased)


# ------------------------------------------------------------------------------------------------------- learner state


def optimizer_state(old: dict[str, Any], new: State, growths: Mapping[str, Growth]) -> dict[str, Any]:
    """The old optimizer's state_dict for the new optimizer, whose groups differ where rates of layers do."""
    fresh = new.saved["optimizer"].state_dict()
    names = [list(new.saved["names"]), list(old["names"])]
    pairs = zip(*(state.get("parts", [state]) for state in (fresh, old["optimizer"])), strict=True)
    parts = [_part(mine, theirs, _take(names[0], mine), _take(names[1], theirs), growths) for mine, theirs in pairs]
    return {"parts": parts} if "parts" in fresh else parts[0]


def _take(names: list[str], part: dict[str, Any]) -> list[str]:
    """The names of a part's parameters, which are removed from the front of those left."""
    size = sum(len(group["params"]) for group in part["param_groups"])
    taken, names[:] = names[:size], names[size:]
    return taken


def _part(
    mine: dict[str, Any], theirs: dict[str, Any], names: list[str], before: list[str], growths: Mapping[str, Growth]
) -> dict[str, Any]:
    groups = {before[i]: group for group in theirs["param_groups"] for i in group["params"]}
    kept = {name: theirs["state"][i] for i, name in enumerate(before) if i in theirs["state"]}
    state = {i: _moments(kept[name], growths.get(name)) for i, name in enumerate(names) if name in kept}
    return {
        "state": {i: moments for i, moments in state.items() if moments},
        "param_groups": [_group(group, groups[names[group["params"][0]]]) if group["params"] else group
                         for group in mine["param_groups"]],
    }  # fmt: skip


def _group(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """What the old group has counted, with the new group's parameters, rate and decay."""
    return theirs | {key: mine[key] for key in ("params", "rate_factor", "weight_decay") if key in mine}


def _moments(kept: dict[str, Any], growth: Growth | None) -> dict[str, Any]:
    """Of one weight; nothing at all if it grows and holds what is not known to follow the gradient."""
    if growth is None:
        return kept
    shaped = {key for key, t in kept.items() if getattr(t, "ndim", 0) > 0}
    if not shaped <= POWERS.keys():
        return {}
    return kept | {key: _moment(kept[key], growth, POWERS[key]) for key in shaped}


def _moment(t: Tensor, growth: Growth, power: int) -> Tensor:
    grown = growth.resample(t, growth.gradient**power)
    return grown.clamp_(min=0) if power == 2 else grown  # bicubic interpolation overshoots


def fit(old: Any, fresh: Any, growths: Mapping[str, Growth]) -> Any:
    """What updates have kept, where `fresh` is what they keep to begin with.

    Tensors under the name of a weight that grows are grown as weights. A map that holds another tensor of another shape is
    made anew as a whole, and so is one that holds something else than at the beginning: of NG-SGD's factors that of inputs
    is dropped, that of outputs kept; K-FAC's, whose scale depends on the number of positions, begin anew together.
    """
    fresh = plain(fresh)
    if isinstance(fresh, list | tuple):
        fits = len(old) == len(fresh)
        return type(fresh)(fit(a, b, growths) for a, b in zip(old, fresh, strict=True)) if fits else fresh
    if not isinstance(fresh, dict):
        return old
    grown = {name: growth.resample(old[name], growth.amplitude) for name, growth in growths.items() if name in old}
    rest = old.keys() - grown.keys()
    if old.keys() != fresh.keys() or any(_shape(old[k]) != _shape(fresh[k]) for k in rest):
        return fresh
    return {k: grown[k] if k in grown else fit(old[k], fresh[k], growths) for k in old}


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)


def plain(value: Any) -> Any:
    """A State or an object as what it saves."""
    if isinstance(value, State):
        return value.saved
    return value.state_dict() if hasattr(value, "state_dict") else value
