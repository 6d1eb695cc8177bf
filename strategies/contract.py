"""The contract between training methods and the trainer.

A strategy edits a plan; the trainer runs plans and has never heard of strategies. Information flows one way:
recipe -> strategies -> plan -> trainer -> store. The seams of a phase, in the order in which they act:

    model (spec) -> surgery (net -> net) -> carry (old weights -> new net), or initialise (weights from data)
    -> source (the data this phase sees) -> maps (batch -> batch) -> learner; inside the usual learner, `Backprop`:
    objective -> gradient -> updates -> optimizer / rate; and in evaluation: views (images -> images, logits averaged)

What varies with time is a pure function of `Clock`. What must survive a restart is in `State.saved`, which the trainer
owns. Whatever stands in a plan is a frozen dataclass or a module-level function, so that a plan prints and hashes.

Nothing in this module imports torch when it is imported, so that recipes are checked in milliseconds.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Flag, auto
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from strategies.net import Net

Metrics: TypeAlias = "dict[str, Tensor]"
Weights: TypeAlias = "Mapping[str, Tensor]"


class PlanError(ValueError):
    """A plan that cannot be: names both sides of the clash and the way out."""


class Need(Flag):
    """What part of a phase asks of the engine; checked against `engine.offers` before any worker is taken."""

    NOTHING = 0
    LAYER_GRADS = auto()  # whole gradients of whole layers: no ZeRO sharding
    OPEN_MODEL = auto()  # submodules, or several backwards per micro-batch: no DDP wrapper
    EDIT_WEIGHTS = auto()  # writes weights after a step: no separate master weights
    LAYER_WEIGHTS = auto()  # reads whole weights after a step: no ZeRO 3
    ROLES = auto()  # workers hold different modules and exchange tensors


def mix(*parts: object) -> int:
    """A 63-bit seed from any printable parts, alike on every machine (SHA-256 of their repr)."""
    digest = hashlib.sha256("\x1f".join(repr(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class Clock:
    """Where a phase stands at the start of one optimizer step."""

    step: int  # optimizer steps taken before this one, in this phase
    steps: int  # optimizer steps of the whole phase
    epoch: float  # passes over the data set made before this step, in this phase
    epochs_per_step: float  # what one step adds to `epoch`
    batch: int  # global batch: examples per optimizer step
    seed: int  # the trial's seed
    phase: int = 0  # position of the phase in the plan
    rank: int = 0

    @property
    def done(self) -> float:
        """The share of the phase that lies behind, in [0, 1]."""
        return self.step / self.steps if self.steps else 1.0

    def noise(self, tag: str, own: bool = False) -> torch.Generator:
        """A CPU generator for this step: alike on all ranks (or `own` to each), and the same again after a resume."""
        import torch

        parts = (self.seed, tag, self.phase, self.step, self.rank if own else -1)
        return torch.Generator().manual_seed(mix(*parts))


@dataclass(slots=True)
class State:
    """What a learner or an update keeps between steps."""

    saved: dict[str, Any] = field(default_factory=dict)
    """Tensors, numbers, strings, lists, dicts, States, anything with a state_dict: checkpointed by the trainer."""
    live: Any = None
    """Layers, hooks, the worker: `init` makes it again after a resume."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of one micro-batch, on the worker's device."""

    x: Tensor  # (n, ...) inputs in the training dtype
    y: Tensor  # (n,) int64 class labels, or (n, classes) soft labels
    position: Tensor  # (n,) int64 place of each example in the trial's endless stream of examples

    def __len__(self) -> int:
        return len(self.x)


Predict: TypeAlias = "Callable[[Tensor], Tensor]"
"""(n, ...) inputs -> (n, classes) logits."""


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Until the tensor may be used, and changed, again."""


class Worker(Protocol):
    """The verbs that an engine offers to science code; `cluster.engines` implements them."""

    rank: int  # 0 .. size-1
    size: int  # workers in the gang
    roles: int  # parts that the model is spread over
    holders: int  # workers that share out an optimizer's state among them; 1: each holds all of it
    device: torch.device
    memory: Any
    """What the engine remembers of this model from step to step, with a state_dict, or None; learners save it."""

    def take_roles(self, roles: int) -> None:
        """Before a trial: its model is spread over so many parts. Raises PlanError where they do not divide the workers."""

    @property
    def role(self) -> int:
        """The part of the model that this worker trains: rank % roles."""

    @property
    def replica(self) -> int:
        """To which copy of the whole model this worker belongs: rank // roles."""

    @property
    def replicas(self) -> int:
        """Copies of the whole model, which share out a batch: size / roles."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision for a forward pass, as the trial's precision has it; nothing for fp32 and fp64."""

    def backward(self, value: Tensor, grad: Tensor | None = None) -> None: ...
    def sum_(self, t: Tensor) -> Tensor:
        """`t`, summed over workers in place, alike on every rank; returns it."""

    def reduce(self, t: Tensor, to: int) -> Pending:
        """Begin to sum contiguous `t` over workers into that of rank `to`; the others' is spoilt. Alike on all workers."""

    def broadcast(self, t: Tensor, source: int, among: Sequence[int]) -> Pending:
        """Begin to fill contiguous `t` with that of rank `source`, on the workers `among`, which alone call it, in the same
        order."""

    def sum_role_(self, t: Tensor) -> Tensor:
        """`t`, summed in place over the workers of the same role, alike on each; returns it."""

    def send(self, t: Tensor, role: int) -> Pending:
        """Begin to send contiguous `t` to the worker of that role in this replica. Until it has waited, leave `t` as it is."""

    def recv(self, t: Tensor, role: int) -> Pending:
        """Begin to fill contiguous `t` with what that worker sends, in the order in which it sends."""

    def prepare(self, net: Net, optimizer: Optimizer, open_model: bool) -> nn.Module:
        """The module to call in training: wrapped so that gradients are averaged, unless `open_model`."""

    def whole(self, optimizer: Optimizer) -> Any:
        """What stands for a prepared optimizer in checkpoints: its state_dict is whole, as one worker alone has it."""

    def settle(self) -> None:
        """Before each row, on all workers: `memory` alike."""

    def gather(self, optimizer: bool = False) -> None:
        """On all workers at once: weights whole on each until the next step, for evaluation and at the end of a phase;
        with `optimizer` its state too, for checkpoints."""

    def micro(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch: workers synchronise in the `last` one of a step only."""

    def apply(
        self, model: nn.Module, optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        """Average gradients over workers where `prepare` did not; then before, optimizer step, after, zero_grad."""


Surgery: TypeAlias = "Callable[[Net], Net]"
Carry: TypeAlias = "Callable[[Weights, Net], None]"
"""Old weights into the new network, in place. A carry may also have `state(old, new) -> content of a State`, which makes what
the phase before hands on fit the learner of a network of another shape; `old` is decoded, `new` the State as it begins."""
Initialise: TypeAlias = "Callable[[Net, Callable[[int], Batch]], None]"
"""Sets weights of a new network in place. `read(n)`: the first n training examples, or all if there are fewer, in the
order of the data set, as this phase sees them but neither augmented nor mapped; alike on all ranks."""
Source: TypeAlias = "Callable[[Batch, Net], Batch]"
"""A batch as this phase's network sees it, in training and in evaluation."""


@dataclass(frozen=True, slots=True)
class Stream:
    """What a map may see beside its micro-batch, alike however a batch is shared out."""

    ahead: Callable[
        [int], Batch
    ]  # the unmapped examples that stand so many places further on than the micro-batch's own
    classes: int


@dataclass(frozen=True, slots=True)
class View:
    """One way to look at the images of a test: the logits of all views of a phase are averaged by weight."""

    change: Callable[[Tensor], Tensor]  # (n, c, h, w) -> (n, c, h, w)
    weight: float = 1.0  # > 0; relative to the other views'


BatchMap: TypeAlias = "Callable[[Batch, Clock, Stream], Batch]"
"""A change of the training batch."""
Objective: TypeAlias = "Callable[[Predict, Batch, Clock], Tensor]"
"""-> () mean loss over the micro-batch."""
Schedule: TypeAlias = "Callable[[Clock], float]"


class Learner(Protocol):
    """Turns the micro-batches of one optimizer step into new weights: the bottom escape for what no other seam fits.

    A learner may also have `rate`, the schedule that rows show, where no metric "rate" tells it; `ended(state) -> bool`: the
    phase ends with the step just taken, on all ranks alike; `settle(state)`: before each row, on all ranks: make what the
    network holds, and what is in `state.saved`, alike on all; `gather(state)`: before each checkpoint, on all ranks: make what
    is spread over them whole on rank 0; and `refresh(state, read)`: before each evaluation, of which the last step has one:
    `read(n)` gives n training examples, alike on all ranks, or all if there are fewer.
    """

    @property
    def needs(self) -> Need: ...
    def init(self, net: Net, worker: Worker) -> State: ...
    def step(self, state: State, batches: Sequence[Batch], clock: Clock) -> Metrics:
        """One optimizer step. Each value returned is this rank's share: the trainer sums over ranks. Needs "loss".

        Each micro-batch is made when it is asked for, so that a step need not hold all of them.
        """

    def predict(self, state: State, x: Tensor) -> Tensor:
        """(n, ...) -> (n, classes) logits, in evaluation mode, with the weights that stand for the result."""

    def finish(self, state: State) -> None:
        """After the last step of the phase."""


def keep(old: Weights, net: Net) -> None:
    """The usual carry: weights of the phase before, name by name."""
    net.load_state_dict(dict(old))


def all_data(batch: Batch, net: Net) -> Batch:
    """The usual source: the data set as it is."""
    return batch


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """How to build a network: `build(inputs, classes, **options)`, seeded by the trainer."""

    build: Callable[..., Net]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, inputs: tuple[int, ...], classes: int) -> Net:
        return self.build(inputs, classes, **dict(self.options))


@dataclass(frozen=True, slots=True)
class Cache:
    """Of a phase whose network reads what its first stages make of the data; these are frozen, and keep the names
    `net.stages`. The trainer keeps it on file, one entry for each example, and computes it once for all phases alike."""

    stages: int
    store: str  # exact; fp16; uint8: between each example's least and largest value


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of a trial with one model shape, one view of the data, one way to learn."""

    name: str
    epochs: float  # passes over the data set; > 0
    batch: int  # global batch: examples per optimizer step
    model: ModelSpec
    learner: Learner
    carry: Carry = keep
    source: Source = all_data
    surgery: tuple[Surgery, ...] = ()
    initialise: tuple[Initialise, ...] = ()  # where no weights are carried
    maps: tuple[BatchMap, ...] = ()
    views: tuple[View, ...] = ()  # none: images are evaluated as they are
    cache: Cache | None = None
    hands_on: bool = False  # the next phase goes on with this one's learner state, not with its weights alone

    def steps(self, examples: int) -> int:
        """Optimizer steps on a data set of `examples`: the epochs, rounded up to whole batches but not by rounding errors."""
        return max(1, ceil(self.epochs * examples / self.batch - 1e-6))


@dataclass(frozen=True, slots=True)
class Plan:
    phases: tuple[Phase, ...]
    roles: int = 1  # parts that the model is spread over; workers = roles x replicas

    @property
    def needs(self) -> Need:
        needs = Need.ROLES if self.roles > 1 else Need.NOTHING
        for phase in self.phases:
            needs |= phase.learner.needs
        return needs

    def map(self, change: Callable[[Phase], Phase]) -> Plan:
        """This plan with every phase changed."""
        return dataclasses.replace(self, phases=tuple(change(p) for p in self.phases))


def option(default: Any, doc: str, **limits: float) -> Any:
    """A strategy's option with its meaning and range (`ge`, `gt`, `le`, `lt`), of each number in a list, which recipe and
    constructor enforce."""
    return field(default=default, metadata={"doc": doc, "limits": limits})


BEYOND = {
    "ge": lambda value, bound: value < bound,
    "gt": lambda value, bound: value <= bound,
    "le": lambda value, bound: value > bound,
    "lt": lambda value, bound: value >= bound,
}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True, slots=True)
class Strategy(ABC):
    """A training method: frozen options, made with `option`, and one pure method."""

    parts_matter: ClassVar[bool] = False
    """Whether results depend on how a batch is shared out to workers and micro-batches, beyond rounding."""
    scales_rate: ClassVar[bool] = False
    """Whether the method itself sets the rate by the batch size, so that no scaling rule may."""

    @abstractmethod
    def edit(self, plan: Plan) -> Plan:
        """The plan with this method in it. No files, no devices, no globals. Raises PlanError if it cannot be."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            each = value if isinstance(value, list | tuple) else (value,)
            for kind, bound in f.metadata.get("limits", {}).items():
                if any(v is not None and BEYOND[kind](v, bound) for v in each):
                    raise PlanError(f"{type(self).__name__}: {f.name} is {value}, expected {SIGNS[kind]} {bound}")
