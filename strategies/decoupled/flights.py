"""Batches under way through modules that work on several of them at once, in memory and in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from strategies.contract import Worker, mix
from strategies.decoupled import shares
from strategies.decoupled.shares import MICRO
from strategies.parts.replicas import copy_

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from strategies.decoupled.boundary import CutNet
    from strategies.decoupled.roles import Line, Message

LABELS = ("y", "position")  # which all workers of a replica have


@dataclass(frozen=True, slots=True)
class Ages:
    """When modules work on a batch, by the number of steps since it was read. `top`: the number of the last module."""

    top: int
    apart: bool  # each passes it forward a step after the one below it

    def forward(self, number: int) -> int:
        return number if self.apart else 0

    def back(self, number: int) -> int:
        return 2 * self.top - number if self.apart else self.top - number

    def between(self, age: int) -> list[int]:
        """The modules below the last that have passed a batch of this age forward and have yet to go backward."""
        return [n for n in range(self.top) if self.forward(n) < age <= self.back(n)]

    def holders(self, age: int) -> dict[str, int]:
        """What a micro-batch of this age consists of between steps, but for labels, and the module that needs it."""
        coming = {"x": age} if self.apart and age <= self.top else {"grad": self.back(age)}  # `back` is its own inverse
        return {f"given {n}": n for n in self.between(age)} | coming


@dataclass(slots=True)
class Flight:
    """A batch under way, this worker's share of it. A micro-batch has x (as the next module forward is given it), y,
    position, `given k` for each module that has yet to go backward, and grad, of what the last of these is to send on."""

    size: int  # examples of the global batch
    seed: int  # of what modules draw in its forward passes, such as dropout
    micros: list[dict[str, Tensor]]
    age: int = 0
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by module, as at its forward pass
    passed: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # by module: x, h of each micro-batch
    coming: list[Message] = field(default_factory=list)  # of what the micro-batches have from neighbours

    def draw(self, number: int, device: torch.device) -> None:
        """From now on, what a module draws in its forward pass, each time that it is made."""
        import torch

        seed = mix(self.seed, number)
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def expect(self, line: Line, name: str, shape: Sequence[int], role: int) -> None:
        """Asks a neighbour for x or grad of each micro-batch."""
        for micro in self.micros:
            micro[name], message = line.expect((len(micro["y"]), *shape), role)
            self.coming.append(message)

    def arrive(self) -> None:
        """Until all that was asked for is there."""
        for message in self.coming:
            message.wait()
        self.coming = []


class Books:
    """Flights as checkpoints have them, without graphs: alike whether one worker has all modules or each has its own.

    worker: stands for those of one role where there is a `line`; kept: whether weights of forward passes are kept.
    """

    def __init__(self, net: CutNet, ages: Ages, worker: Worker, line: Line | None, kept: bool):
        self.net, self.ages, self.worker, self.line, self.kept = net, ages, worker, line, kept
        self.parameters = [dict(part.named_parameters()) for part in net.parts()]

    def whole(self, flight: Flight) -> dict[str, Any]:
        """All workers' shares as one, alike on every rank; they have arrived."""
        micros, held, everyone = flight.micros, None, None
        if self.line:
            held, everyone = self._held(flight.age), self.line.worker
            micros = [self._filled(micro, flight.age) for micro in micros]
        wholes = shares.whole(micros, flight.size, self.worker, everyone, held)
        told = {"size": flight.size, "seed": flight.seed, "age": flight.age}
        return told | {"weights": self._weights(flight), "micros": wholes}

    def own(self, saved: dict[str, Any]) -> Flight:
        """This worker's share of what was `whole`."""
        micros, weights = shares.own(saved["micros"], self.worker), saved["weights"]
        if self.line:
            names = {*self._held(saved["age"]), *LABELS}
            micros = [{name: t for name, t in micro.items() if name in names} for micro in micros]
            weights = {number: w for number, w in weights.items() if int(number) == self.line.role}
        here = {k: {name: t.to(self.worker.device) for name, t in w.items()} for k, w in weights.items()}
        return Flight(saved["size"], saved["seed"], micros, saved["age"], here)

    def _held(self, age: int) -> set[str]:
        """Of the names of a micro-batch, those of this worker's role; labels are the first one's."""
        role = self.line.role if self.line else 0
        labels = () if role else (*LABELS, MICRO)
        return {name for name, number in self.ages.holders(age).items() if number == role} | {*labels}

    def _filled(self, micro: dict[str, Tensor], age: int) -> dict[str, Tensor]:
        """With nothing in place of what other roles have; takes no memory."""
        like, filled = next(self.net.parameters()), {name: micro[name] for name in LABELS}
        for name, number in self.ages.holders(age).items():
            shape = self.net.shapes[number] if name == "grad" else (self.net.inputs, *self.net.shapes)[number]
            filled[name] = micro[name] if name in micro else like.new_zeros(()).expand(len(micro["y"]), *shape)
        return filled

    def _weights(self, flight: Flight) -> dict[str, dict[str, Tensor]]:
        found = {}
        for number in self.ages.between(flight.age) if self.kept else ():
            own = flight.weights.get(str(number), self.parameters[number])  # anything, where another role has them
            found[str(number)] = {name: t.detach().contiguous().clone() for name, t in own.items()}
            if self.line:
                copy_([*found[str(number)].values()], self.line.worker, number)
        return found
