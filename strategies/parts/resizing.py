"""A run cut into phases that see smaller images: their source, their networks, their share of schedule and epochs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

from strategies.backprop import Backprop, Update, amend
from strategies.contract import (
    Batch,
    Clock,
    ModelSpec,
    Need,
    Phase,
    Plan,
    PlanError,
    Schedule,
    State,
    Worker,
    all_data,
    keep,
)
from strategies.parts.batch_norm import reestimate, tracking

if TYPE_CHECKING:
    from strategies.net import Net

LOW = 0.3  # of the rate: where a warm-up after a switch starts


@dataclass(frozen=True, slots=True)
class Resize:
    """A source: images of `scale` times their sides, to the nearest `multiple` of pixels, by antialiased bilinear
    interpolation between pixel centres."""

    scale: float
    multiple: int = 1

    def __call__(self, batch: Batch, net: Net) -> Batch:
        from torch.nn.functional import interpolate

        _, *sides = self.shape(tuple(batch.x.shape[1:]))
        if sides == list(batch.x.shape[2:]):
            return batch
        x = interpolate(batch.x, sides, mode="bilinear", antialias=True, align_corners=False)
        return dataclasses.replace(batch, x=x)

    def shape(self, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """(c, h, w) of what becomes of images of that shape. Raises PlanError for data that are no images."""
        if len(inputs) != 3:
            raise PlanError(f"smaller images need images, but the data have shape {inputs}: leave the method out")
        channels, *sides = inputs
        return channels, *(
            min(side, max(1, round(side * self.scale / self.multiple)) * self.multiple) for side in sides
        )


def resized(inputs: tuple[int, ...], classes: int, model: ModelSpec, resize: Resize) -> Net:
    """The model as it is for the images of a phase."""
    return model(resize.shape(inputs), classes)


@dataclass(frozen=True, slots=True)
class Continued:
    """A schedule of a whole run, in a phase that begins `begin` epochs after the run did."""

    schedule: Schedule
    begin: float
    epochs: float  # of the run
    rewarm: float = 0.0  # epochs over which the rate rises from LOW times the schedule's to the schedule's

    def __call__(self, clock: Clock) -> float:
        risen = (clock.epoch + clock.epochs_per_step) / (self.rewarm + clock.epochs_per_step)
        return self.schedule(self.of_run(clock)) * (LOW + (1 - LOW) * min(risen, 1.0))

    def of_run(self, clock: Clock) -> Clock:
        """The same moment on the clock of the run."""
        steps = max(1, ceil(self.epochs / clock.epochs_per_step - 1e-6))
        step = clock.step + round(self.begin / clock.epochs_per_step)
        epoch = step * clock.epochs_per_step
        return dataclasses.replace(clock, step=min(step, steps), steps=steps, epoch=epoch)


@dataclass(frozen=True, slots=True)
class Recalibrate(Update):
    """Estimates running statistics of batch norms anew over training examples: at the first evaluation after a switch and
    at the last of a phase."""

    examples: int
    needs = Need.LAYER_WEIGHTS

    def init(self, net: Net, worker: Worker) -> State:
        return State({"due": False}, (net, worker))

    def before(self, state: State, clock: Clock) -> None:
        switched = clock.step == 0 and clock.phase > 0
        state.saved["due"] |= switched or clock.step + 1 == clock.steps

    def refresh(self, state: State, read: Callable[[int], Batch]) -> None:
        net, worker = state.live
        if state.saved["due"] and self.examples and tracking(net):
            reestimate(net, read(self.examples).x, worker)
        state.saved["due"] = False


def only_phase(plan: Plan, by: object) -> Phase:
    """The phase of a plan that has one, which can be cut. Raises PlanError if there are more, or it has a source."""
    name = type(by).__name__
    if len(plan.phases) > 1:
        raise PlanError(f"{name} cuts one run into phases, but the plan has several already: leave one method out")
    (phase,) = plan.phases
    if phase.source is not all_data:
        raise PlanError(f"{name} resizes the data of phase '{phase.name}', which another method chooses: leave one out")
    learner = amend(phase, by).learner
    if isinstance(learner, Backprop) and learner.ends_itself:
        raise PlanError(
            f"{name} gives each phase its share of the epochs, but adascale ends a phase by itself: leave one out"
        )
    return phase


def cut(
    phase: Phase,
    by: object,
    shares: Sequence[float],
    resizes: Sequence[Resize],
    updates: tuple[Update, ...],
    rewarm: float = 0.0,
) -> Iterator[Phase]:
    """The phase in stretches, one per share of its epochs, each on images of its own size. Weights, learner state and rate go
    on; after each switch the rate rises over `rewarm` epochs."""
    begin = 0.0
    for n, (share, resize) in enumerate(zip(shares, resizes, strict=True)):
        rate = partial(Continued, begin=begin, epochs=phase.epochs, rewarm=rewarm if n else 0.0)
        amended = amend(phase, by, updates=updates, rate=rate)
        yield dataclasses.replace(
            amended,
            name=f"{phase.name} {n + 1}",
            epochs=share * phase.epochs,
            carry=keep if n else phase.carry,
            source=resize,
            hands_on=phase.hands_on or n + 1 < len(shares),
        )
        begin += share * phase.epochs
