"""Stage-wise: one part of the network after the other, each with a head of its own, what lies before it frozen.

Griswold's partial learning; with pooled heads and 50 epochs it is greedy layer-wise training (Belilovsky, Eickenberg & Oyallon
2019, arXiv 1812.11446). Each part is a phase: it is known by what came before it and not by what follows, so that trials which
begin alike share what they have trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from strategies.backprop import Update, amend
from strategies.contract import (
    Batch,
    Cache,
    Clock,
    ModelSpec,
    Objective,
    Phase,
    Plan,
    PlanError,
    Predict,
    State,
    Strategy,
    Weights,
    Worker,
    option,
)

if TYPE_CHECKING:
    from torch import Tensor

    from strategies.net import Net

Heads: TypeAlias = Literal["own", "linear", "pooled", "network"]
CHUNK = 256  # examples whose loss is computed at once


@dataclass(frozen=True, slots=True)
class StageWise(Strategy):
    cuts: list[int] | None = option(
        None,
        "stages behind which the network is cut; []: not at all; none: behind each, where the model lists its stages",
    )
    head: Heads = option(
        "pooled",
        "of every part but the last, which has the network's own: linear; averaged over the image, then linear; a "
        "convolution (or a hidden layer), then as pooled; own: the model's, cut there, where the model lists its stages",
    )
    epochs: list[float] | None = option(None, "of each part, in passes over the data; none: the base's for each")
    rates: list[float | None] | None = option(
        None, "peak learning rate of each part, at the trial's batch size; null, or none: the base's"
    )
    weight_decay: list[float | None] | None = option(None, "of each part; null, or none: the base's")
    unsupervised: int = option(
        0, "first parts that learn to reconstruct their input; their heads pass no gradient on", ge=0
    )
    patience: int | None = option(
        None, "evaluations in a row without a lower loss after which a part ends early; none: it does not", ge=1
    )
    watched: int = option(
        1000, "first training examples of the trial, whose loss in evaluation mode `patience` watches", ge=1
    )
    ensemble: float | None = option(
        None,
        "evaluate by the mean of all heads' logits, each weighing so many times the one before; none: the last",
        gt=0,
    )
    cache: Literal["off", "exact", "fp16", "uint8"] = option(
        "off",
        "keep the features of frozen stages on file, beside the finished phases: as they are, in half precision, or as "
        "bytes between each example's least and largest; off: compute them anew",
    )

    def edit(self, plan: Plan) -> Plan:
        ends = self._ends(plan.phases[0].model)
        self._check(plan, len(ends))
        return dataclasses.replace(
            plan, phases=tuple(self._phase(plan, i, ends[: n + 1], last=n == len(ends) - 1)
                               for n in range(len(ends)) for i in range(len(plan.phases)))
        )  # fmt: skip

    def _ends(self, model: ModelSpec) -> tuple[int | None, ...]:
        """Behind which stage each part ends; None for the end of a network that does not list its stages."""
        count, cuts = listed(model), self.cuts
        if cuts is None:
            if count is None:
                raise PlanError(
                    "stage_wise: this model does not list its stages: state where to cut, e.g. cuts: [1, 2]"
                )
            return tuple(range(1, count + 1))
        if sorted({*cuts}) != list(cuts) or any(cut < 1 or (count and cut >= count) for cut in cuts):
            most = f" and below {count}" if count else ""
            raise PlanError(f"stage_wise: cuts are {list(cuts)}, expected rising numbers of stages, from 1 on{most}")
        return (*cuts, count)

    def _check(self, plan: Plan, parts: int) -> None:
        lists = {"epochs": self.epochs, "rates": self.rates, "weight_decay": self.weight_decay}
        stated = {name: values for name, values in lists.items() if values is not None}
        for name, values in stated.items():
            if len(values) != parts or any(v is not None and v < 0 for v in values):
                raise PlanError(f"stage_wise: {name} is {values}, expected {parts} numbers, one for each part")
        if any(epochs <= 0 for epochs in self.epochs or ()):
            raise PlanError(f"stage_wise: epochs are {self.epochs}, expected > 0")
        if len(plan.phases) > 1 and stated:
            raise PlanError(
                f"stage_wise: {', '.join(stated)} of parts that have phases of their own: put stage_wise first"
            )
        if any(phase.model != plan.phases[0].model for phase in plan.phases):
            raise PlanError("stage_wise cuts one network, but the plan has several: leave out what changes the network")
        if self.unsupervised >= parts:
            raise PlanError(f"stage_wise: unsupervised is {self.unsupervised}, expected less than its {parts} parts")
        if self.unsupervised and self.patience:
            raise PlanError("stage_wise: patience watches the loss of the head, which does not move an unsupervised part: "
                            "leave out patience or unsupervised")  # fmt: skip
        if self.head == "own" and parts > 1 and listed(plan.phases[0].model) is None:
            raise PlanError(
                "stage_wise: head: own needs a model that lists its stages: write linear, pooled or network"
            )
        if self.ensemble is not None and self.cache != "off":
            raise PlanError("stage_wise: the cache keeps the last features alone, which earlier heads cannot read: "
                            "leave out cache or ensemble")  # fmt: skip

    def _phase(self, plan: Plan, index: int, ends: tuple[int | None, ...], last: bool) -> Phase:
        phase, number = plan.phases[index], len(ends) - 1
        cache = Cache(ends[-2] or 0, self.cache) if number and self.cache != "off" else None
        heads: tuple[Heads, ...] = (*[self.head] * number, "own" if last else self.head)
        part = Part(ends, heads, self.ensemble, number < self.unsupervised, cache is not None)
        spec = first(phase.model, ends[-1])
        return dataclasses.replace(
            self._learner(phase, number),
            name=f"{phase.name} stage {number + 1}",
            epochs=self.epochs[number] if self.epochs else phase.epochs,
            model=ModelSpec(network, (("model", spec), ("part", part))),
            carry=take if number and not index else phase.carry,
            cache=cache,
        )

    def _learner(self, phase: Phase, number: int) -> Phase:
        """With the part's own rate and decay, objective and end."""
        changes: dict[str, Callable[[Any], Any]] = {}
        if self.rates and (peak := self.rates[number]) is not None:
            changes["rate"] = lambda old: _with(old, "rates", peak=peak)
        if self.weight_decay and (decay := self.weight_decay[number]) is not None:
            changes["optimizer"] = lambda old: _with(old, "weight_decay", weight_decay=decay)
        if number < self.unsupervised:
            changes["objective"] = Reconstruction
        ends = (Patience(self.patience, self.watched),) if self.patience else ()
        return amend(phase, self, updates=ends, **changes)


def _with(old: Any, name: str, **values: float) -> Any:
    if not all(hasattr(old, key) for key in values):
        raise PlanError(f"stage_wise: {name} cannot be set in {old}: put stage_wise before the other strategies")
    return dataclasses.replace(old, **values)


def listed(model: ModelSpec) -> int | None:
    """How many stages the model's option `stages` lists, a text or number for each stage of its network; None without one."""
    stages = dict(model.options).get("stages")
    if not isinstance(stages, Sequence) or not all(isinstance(stage, str | int) for stage in stages):
        return None
    return len(stages)


def first(model: ModelSpec, count: int | None) -> ModelSpec:
    """The model up to its first stages, if it lists them, so that networks that begin alike are the same up to there."""
    if listed(model) is None:
        return model
    cut = [(name, value[:count] if name == "stages" else value) for name, value in model.options]
    return dataclasses.replace(model, options=tuple(cut))


@dataclass(frozen=True, slots=True)
class Part:
    """What a phase trains: the stages between the last two ends; what comes before is frozen."""

    ends: tuple[int | None, ...]  # of the parts up to this one
    heads: tuple[Heads, ...]  # likewise
    growth: float | None  # of the weights of heads in an ensemble
    reconstructs: bool
    cached: bool  # the network reads features, not images


def network(inputs: tuple[int, ...], classes: int, model: ModelSpec, part: Part) -> Net:
    from strategies.parts.staged_net import build

    return build(inputs, classes, model, part)


def take(old: Weights, net: Net) -> None:
    """Carry: frozen stages from the part before; the new ones and their head as they were made."""
    from strategies.parts.staged_net import StagedNet

    assert isinstance(net, StagedNet), "a surgery took the staged network's place"
    net.take(old)


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """The loss of the head, which reads the features and does not move them, plus the mean squared error of reconstruction."""

    classified: Objective
    of_labels: ClassVar[bool] = False

    def __call__(self, predict: Predict, batch: Batch, clock: Clock) -> Tensor:
        out = predict(batch.x)
        return self.classified(lambda x: out[:, :-1], batch, clock) + out[:, -1].mean()


@dataclass(frozen=True, slots=True)
class Patience(Update):
    """Ends the phase when the cross-entropy of the first training examples has not fallen for some evaluations."""

    evaluations: int
    examples: int

    def init(self, net: Net, worker: Worker) -> State:
        return State({"best": None, "waited": 0}, (net, worker))

    def refresh(self, state: State, read: Callable[[int], Batch]) -> None:
        loss, saved = self._loss(state, read(self.examples)), state.saved
        better = saved["best"] is None or loss < saved["best"]
        state.saved = {"best": loss if better else saved["best"], "waited": 0 if better else saved["waited"] + 1}

    def _loss(self, state: State, batch: Batch) -> float:
        """Alike on all ranks, each of which takes a share of the examples."""
        import torch
        from torch.nn.functional import cross_entropy

        net, worker = state.live
        x, y = (t.tensor_split(worker.size)[worker.rank] for t in (batch.x, batch.y))
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        net.eval()
        with torch.no_grad(), worker.autocast():
            for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                total += cross_entropy(net(part), labels, reduction="sum").double()
        return float(worker.sum_(total)) / len(batch)

    def ended(self, state: State) -> bool:
        return bool(state.saved["waited"] >= self.evaluations)
