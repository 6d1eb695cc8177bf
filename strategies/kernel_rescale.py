"""Kernel rescaling: a cheap run on small images with small kernels, which grow together to those of the model.

After de Gusmao, Francini, Lepsoy & Magli 2016, arXiv 1610.03623: a convolution stays the same under a common change of scale of
images and kernels. All choices are our own: no code and no details are published. See `strategies.parts.kernel_growth` for
how weights and learner state grow. Every phase but the last has smaller kernels, and images as much smaller unless `scales`
says otherwise, on which it is also evaluated. Strides, biases, norms and pooling windows stay as they are; layers behind a
flattened map are convolutions with a kernel as large as the map. The schedule of the rate goes on over all phases. The rate
is that of the network with the first kernels; layers without a norm behind them learn more slowly when they have grown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from strategies.contract import ModelSpec, Phase, Plan, PlanError, Strategy, option
from strategies.parts.kernel_growth import Amplitude, Grow, Interpolation
from strategies.parts.layers import WholeLayers
from strategies.parts.resizing import Recalibrate, Resize, cut, only_phase, resized

if TYPE_CHECKING:
    from strategies.net import Net

KERNELS = ("kernel", "kernels", "stem")
"""Options of models that are sides of kernels, in taps."""


@dataclass(frozen=True, slots=True)
class KernelRescale(Strategy):
    shares: list[float] = option(
        (0.3,),
        "share of the epochs of each phase before the last, less than 1 in all; empty: no such phase",
        gt=0,
        lt=1,
    )
    kernels: list[int] = option(
        (3,),
        "odd side of the model's largest kernel in each of these phases, growing; its others follow in proportion, to the "
        "nearest odd side of 3 or more",
        ge=3,
    )
    scales: list[float] | None = option(
        None, "side of the images of each of these phases over that of whole ones; none: as the kernels'", gt=0, le=1
    )
    interpolation: Interpolation = option(
        "bilinear",
        "of kernels, between centres of taps; nearest: only exact, but then wholly, for whole factors; moments: exact for "
        "images that are polynomials of degrees below the old side",
    )
    amplitude: Amplitude = option(
        "auto",
        "factor of a kernel of a x a taps that becomes one of b x b; kernel_ratio: (a/b)^2; auto: a/b in front of a norm, "
        "where it changes nothing but the length of the weights, else (a/b)^2",
    )
    state: Literal["transfer", "reset"] = option(
        "transfer", "momentum and whatever else learners keep grows with the kernels, or begins anew after each switch"
    )
    rewarm: float = option(
        0.0, "epochs after each switch over which the rate rises from 0.3 times to the schedule's", ge=0
    )
    examples: int = option(
        1024, "training examples, at most, over which batch norms' statistics are estimated anew; 0: none", ge=0
    )

    def __post_init__(self) -> None:
        Strategy.__post_init__(self)
        if sum(self.shares) >= 1:
            raise PlanError(f"KernelRescale: shares are {list(self.shares)}, expected less than 1 in all")
        if not all(side % 2 for side in self.kernels):
            raise PlanError(f"KernelRescale: kernels are {list(self.kernels)}, expected odd sides")
        for name, values in (("kernels", self.kernels), ("scales", self.scales)):
            if self.shares and values is not None and len(values) != len(self.shares):
                raise PlanError(f"KernelRescale: {name} are {list(values)}, expected {len(self.shares)}, one per share")

    def edit(self, plan: Plan) -> Plan:
        if not self.shares:
            return plan
        phase = only_phase(plan, self)
        largest = largest_kernel(phase.model)
        sides = [*self.kernels, largest]
        if self.kernels[0] >= largest or any(a > b for a, b in pairwise(sides)):
            raise PlanError(
                f"kernel_rescale grows kernels up to the model's, of side {largest}, but kernels is {list(self.kernels)}: "
                "expected growing sides below it, or progressive_resize, which resizes images alone"
            )
        ratios = [side / largest for side in self.kernels]
        resizes = [Resize(scale) for scale in (*(self.scales or ratios), 1.0)]
        models = [with_kernels(phase.model, ratio) for ratio in (*ratios, 1.0)]
        stages = tuple(ModelSpec(resized, (("model", m), ("resize", r))) for m, r in zip(models, resizes, strict=True))
        return dataclasses.replace(plan, phases=tuple(self._phases(phase, stages, resizes)))

    def _phases(self, phase: Phase, stages: tuple[ModelSpec, ...], resizes: Sequence[Resize]) -> Iterator[Phase]:
        grow = Grow(self.interpolation, self.amplitude)
        shares = [*self.shares, 1 - sum(self.shares)]
        whole = (WholeLayers(),) if self.state == "transfer" else ()
        updates = (*whole, Recalibrate(self.examples))
        for n, part in enumerate(cut(phase, self, shares, resizes, updates, self.rewarm)):
            model = ModelSpec(grown, (("stages", stages[: n + 1]), ("grow", grow)))
            hands_on = part.hands_on and self.state == "transfer"
            yield dataclasses.replace(part, model=model, carry=grow if n else part.carry, hands_on=hands_on)


def largest_kernel(model: ModelSpec) -> int:
    """The largest of the model's kernels, as its options have it. Raises PlanError if it has no such options."""
    options = dict(model.options)
    sides = [side for key in KERNELS if key in options for side in _sides(options[key])]
    if not sides:
        raise PlanError(
            f"kernel_rescale asks for smaller kernels, but model {options.get('name', 'of this plan')} has no option "
            f"{', '.join(KERNELS[:-1])} or {KERNELS[-1]}: choose a model that has, or progressive_resize"
        )
    return max(sides)


def with_kernels(model: ModelSpec, ratio: float) -> ModelSpec:
    """The model with kernels of `ratio` times their sides, to the nearest odd side of 3 or more; smaller ones stay."""
    return ModelSpec(model.build, tuple((k, _scaled(v, ratio) if k in KERNELS else v) for k, v in model.options))


def _scaled(value: Any, ratio: float) -> Any:
    if isinstance(value, int):
        return min(value, max(3, 2 * round((value * ratio - 1) / 2) + 1))
    return type(value)(_scaled(side, ratio) for side in value)


def _sides(value: Any) -> Sequence[int]:
    return (value,) if isinstance(value, int) else value


def grown(inputs: tuple[int, ...], classes: int, stages: tuple[ModelSpec, ...], grow: Grow) -> Net:
    """The last of the networks that a run goes through, with rates for weights that have grown on the way to it."""
    nets = [stage(inputs, classes) for stage in stages]
    net = nets[-1]
    for small, large in pairwise(nets):
        for name, growth in grow.growths(small.state_dict(), large).items():
            net.rate_factors[name] = net.rate_factors.get(name, 1.0) * growth.rate
            net.gradient_factors[name] = net.gradient_factors.get(name, 1.0) * growth.gradient
    return net
