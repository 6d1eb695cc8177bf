"""Test-time augmentation: logits are averaged over views of each test image, mirrored and shifted.

With shifts, the unshifted views have half of the weight, those shifted down and right a quarter, those shifted up and left
a quarter, each shared evenly between an image and its mirror image (Jordan 2024, arXiv 2404.00498).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from strategies.contract import Phase, Plan, PlanError, Strategy, View, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TestTimeAugmentation(Strategy):
    mirror: bool = option(True, "also look at the left-right mirror image")
    shift: int = option(0, "pixels by which views are shifted diagonally, both ways; 0: no shifts", ge=0)

    def edit(self, plan: Plan) -> Plan:
        return plan.map(self._look)

    def _look(self, phase: Phase) -> Phase:
        if phase.views:
            raise PlanError(f"phase '{phase.name}' has views already: name one method of test-time augmentation only")
        weights = {0: 0.5, self.shift: 0.25, -self.shift: 0.25} if self.shift else {0: 1.0}
        sides = (False, True) if self.mirror else (False,)
        views = [View(Look(shift, side), weight / len(sides)) for shift, weight in weights.items() for side in sides]
        return dataclasses.replace(phase, views=tuple(views))


@dataclass(frozen=True, slots=True)
class Look:
    shift: int  # pixels up and left; negative: down and right
    mirrored: bool

    def __call__(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h, w); what a shift brings in is reflected. Raises PlanError for other data."""
        from torch.nn.functional import pad

        size = abs(self.shift)
        if x.ndim != 4 or min(x.shape[2:]) <= size:
            raise PlanError(
                f"test_time_augmentation needs images of more than {size} pixels a side, "
                f"the data have shape {tuple(x.shape[1:])}: leave it out"
            )
        if size:
            (h, w), start = x.shape[2:], size + self.shift
            x = pad(x, (size,) * 4, mode="reflect")[:, :, start : start + h, start : start + w]
        return x.flip(3) if self.mirrored else x
