"""Patch affine: convolutions as affine layers over a sequence of patches (after Song, Jung & Park 2016, known by its abstract).

With P the patches of all positions as rows, out = [P, 1] [W, b]', and both gradients follow; values are the convolution's, and
so are its parameters' names. `ng_sgd` then sees each patch as a sample, as with any affine layer, where it would see a
convolution's gradient alone. The patches of one image are correlated: T of them are no T samples, so by default an image
counts once in the memory of a factor, else one batch would make a factor forget all before it. Groups share both factors.
By itself, without `ng_sgd`, the method changes nothing but rounding; `natural_gradient` makes patches of any convolution.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from strategies.contract import Phase, Plan, Strategy, option

if TYPE_CHECKING:
    from strategies.net import Net


@dataclass(frozen=True, slots=True)
class PatchAffine(Strategy):
    mode: Literal["expand", "sample", "reduce"] = option(
        "expand",
        "what factors see of an image: all patches; `positions` of them, drawn anew at each step; or "
        "the mean patch with the summed gradient",
    )
    positions: int = option(32, "positions of an image that `mode: sample` draws, alike for all images", ge=1)
    count: Literal["images", "positions"] = option(
        "images", "what counts as a sample in a factor's memory: an image, or each position that is seen"
    )
    chunk: int = option(64, "MiB of patches in memory at a time; at least those of one image", ge=1)
    largest: int | None = option(
        None, "values in a patch (channels of a group x kernel) up to which a convolution is replaced; none: all", ge=0
    )

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._replace)

    def _replace(self, phase: Phase) -> Phase:
        return dataclasses.replace(phase, surgery=(*phase.surgery, ByPatches(self)))


@dataclass(frozen=True, slots=True)
class ByPatches:
    options: PatchAffine

    def __call__(self, net: Net) -> Net:
        from strategies.parts.patch_layer import Patches, replace

        o = self.options
        return replace(net, Patches(o.mode, o.positions, o.count, o.chunk), o.largest)
