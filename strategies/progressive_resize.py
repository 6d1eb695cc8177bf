"""Progressive resizing: the run begins on small images, which grow in steps to their full size (Howard 2018, fast.ai).

Of the run, the share `delay` is trained on images of `scale` times their sides, the last share, `finetune`, on whole ones,
and in between sides grow evenly, in `steps` sizes. Each size is a phase of its own, evaluated on images of that size; the
network is the same in all, so it has to end in global pooling. Weights, learner state and schedule of the rate go on;
factors of natural_gradient, whose scale depends on the number of positions, begin anew with each size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.contract import ModelSpec, Plan, PlanError, Strategy, option
from strategies.parts.resizing import Recalibrate, Resize, cut, only_phase

if TYPE_CHECKING:
    from strategies.net import Net

ROUNDING = 1e-9  # of a share


@dataclass(frozen=True, slots=True)
class ProgressiveResize(Strategy):
    scale: float = option(0.5, "side of the first images over that of whole ones; 1: no resizing", gt=0, le=1)
    delay: float = option(0.5, "share of the epochs before images grow", ge=0, lt=1)
    finetune: float = option(0.2, "share of the epochs, the last ones, on whole images", gt=0, le=1)
    steps: int = option(3, "sizes between the first and the whole one", ge=0, le=64)
    increment: int = option(4, "sides are multiples of so many pixels", ge=1)
    examples: int = option(
        1024, "training examples, at most, over which batch norms' statistics are estimated anew; 0: none", ge=0
    )

    def __post_init__(self) -> None:
        Strategy.__post_init__(self)
        if self.delay + self.finetune > 1 + ROUNDING:
            raise PlanError(f"ProgressiveResize: delay + finetune is {self.delay + self.finetune:g}, expected <= 1")

    def edit(self, plan: Plan) -> Plan:
        if self.scale == 1:
            return plan
        phase = only_phase(plan, self)
        sizes = [(share, Resize(scale, self.increment)) for share, scale in self.schedule() if share > ROUNDING]
        shares, resizes = [share for share, _ in sizes], [resize for _, resize in sizes]
        first, *rest = cut(phase, self, shares, resizes, (Recalibrate(self.examples),))
        checked = ModelSpec(for_any_size, (("model", phase.model), ("resize", resizes[0])))
        return dataclasses.replace(plan, phases=(dataclasses.replace(first, model=checked), *rest))

    def schedule(self) -> list[tuple[float, float]]:
        """(share of the epochs, scale) of each phase. The ramp is linear; each of its sizes is the one at half its time."""
        ramp = max(1 - self.delay - self.finetune, 0.0)
        grown = [(ramp / self.steps, self.scale + (1 - self.scale) * (n + 0.5) / self.steps) for n in range(self.steps)]
        first = self.delay if self.steps else self.delay + ramp
        return [(first, self.scale), *grown, (self.finetune, 1.0)]


def for_any_size(inputs: tuple[int, ...], classes: int, model: ModelSpec, resize: Resize) -> Net:
    """The model for whole images. Raises PlanError if it cannot take resized ones."""
    import torch

    net, shape = model(inputs, classes), resize.shape(inputs)
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, *shape))
    except RuntimeError as error:
        raise PlanError(
            f"progressive_resize keeps the network while images grow, but it cannot take images of shape {shape}: "
            "choose a model with global pooling, or a larger scale"
        ) from error
    return net.train()
