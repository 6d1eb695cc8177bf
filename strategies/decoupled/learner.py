"""What learners of decoupled modules share: a cut network, an optimizer for each module, and small networks that help."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from strategies.backprop import Backprop, Live, Update, amend, one_forward_one_backward
from strategies.contract import Batch, Clock, Metrics, ModelSpec, Need, Phase, Plan, PlanError, State, Worker
from strategies.parts.replicas import average_, copy_

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from strategies.decoupled.boundary import CutNet
    from strategies.decoupled.roles import Line
    from strategies.net import Net


def network(inputs: tuple[int, ...], classes: int, model: ModelSpec, cuts: tuple[int, ...] | None) -> Net:
    from strategies.decoupled.boundary import build

    return build(inputs, classes, model, cuts)


@dataclass(frozen=True, slots=True)
class Modules(Update):
    """Changes nothing: stands for what modules share, so that no strategy lets workers step alone."""

    def settle(self, state: State) -> None:
        """All is alike already."""


@dataclass(slots=True)
class DecoupledLive(Live):
    net: CutNet
    parts: list[Net]
    helpers: list[nn.Module]  # such as synthesisers
    helper_optimizers: list[Optimizer]
    own: Sequence[int]  # the modules that this worker trains
    line: Line | None  # to the workers that train the others
    told: dict[str, Tensor] = field(default_factory=dict)  # metrics since the last step, this worker's share


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoupled(Backprop):
    """Backprop within each module; what goes between modules, and when, is for those who come after this class.

    ahead: None: all modules on each worker. Else each on workers of its own, which may be so many batches ahead of the next.
    bf16_messages: what these send to each other is rounded to bf16.
    """

    ahead: int | None = None
    bf16_messages: bool = False

    def __post_init__(self) -> None:
        if self.gradient is not one_forward_one_backward:
            raise PlanError(f"decoupled modules have backward passes of their own, in place of {self.gradient}: "
                            "leave one of the two out")  # fmt: skip
        for update in self.updates:
            if update.turn < 2:
                raise PlanError(f"{update} watches whole backward passes, but decoupled modules each have their own: "
                                "leave one of the two out")  # fmt: skip
            if self.ahead is not None and not isinstance(update, Modules):
                raise PlanError(f"{update} looks at all modules, but each is on workers of its own: write `roles: false`, "
                                "or leave it out")  # fmt: skip

    @property
    def needs(self) -> Need:
        return Backprop.needs.fget(self) | Need.OPEN_MODEL  # type: ignore[attr-defined]

    def helpers(self, net: CutNet) -> list[Any]:
        """New small networks that help; each gets an optimizer of its own."""
        return []

    def helper_optimizer(self, helper: Net) -> Optimizer:
        return self.optimizer(helper)

    def helper_rate(self, clock: Clock) -> float:
        return self.rate(clock)

    @abstractmethod
    def exchange(self, state: State, batch: Batch, clock: Clock, weight: float) -> Tensor:
        """Adds one micro-batch's gradients to all parameters, and returns its mean loss.

        `weight`: of the mean gradient of this micro-batch in the worker's; that is averaged over workers afterwards.
        """

    def init(self, net: Net, worker: Worker) -> State:
        from strategies.decoupled import roles
        from strategies.decoupled.boundary import CutNet
        from strategies.net import Net

        if not isinstance(net, CutNet):
            raise PlanError(f"decoupled modules need the network that they were cut from, not {type(net).__name__}: "
                            "leave out what puts another in its place")  # fmt: skip
        parts, line = net.parts(), None
        if self.ahead is not None:
            line, worker = roles.Line(worker, net, self.bf16_messages), roles.one_role(worker, len(parts))
        state = Backprop.init(dataclasses.replace(self, optimizer=OneEach(self.optimizer, parts)), net, worker)
        helpers = [h.to(device=worker.device, dtype=next(net.parameters()).dtype) for h in self.helpers(net)]
        for helper in helpers:
            copy_([*helper.parameters()], worker, 0)
        optimizers = [self.helper_optimizer(Net([], head=helper)) for helper in helpers]
        old: Live = state.live
        state.live = DecoupledLive(net, old.model, old.optimizer, worker, parts, helpers, optimizers,
                                   [worker.role] if line else range(len(parts)), line)  # fmt: skip
        state.saved |= {"helpers": helpers, "helper_optimizers": optimizers}
        return state

    def step(self, state: State, batches: Sequence[Batch], clock: Clock) -> Metrics:
        live: DecoupledLive = state.live
        if live.line:
            batches = list(batches)  # each is made when it is asked for
            live.line.begin([len(batch) for batch in batches], self.ahead or 0)
        metrics = Backprop.step(self, state, batches, clock)
        if live.line:
            self._tell_all(state, live.line, metrics["loss"])
        metrics, live.told = metrics | live.told, {}
        return metrics

    def _tell_all(self, state: State, line: Line, like: Tensor) -> None:
        """All workers tell metrics of the same names: those of modules, and what each rank has waited."""
        live: DecoupledLive = state.live
        own = {f"idle_seconds_{line.worker.rank}": line.idle, f"occupancy_{line.worker.rank}": line.occupancy()}
        ranks = [f"{what}_{rank}" for what in ("idle_seconds", "occupancy") for rank in range(line.worker.size)]
        for name in (*self.names(live), *ranks):
            live.told.setdefault(name, like.new_zeros(()))
        for name, value in own.items():
            self.tell(state, name, like.new_tensor(value))

    def names(self, live: DecoupledLive) -> list[str]:
        """Of what is told by the workers of some modules only."""
        return []

    def top(self, state: State, batch: Batch, clock: Clock, weight: float) -> Tensor:
        """The last module's forward and backward pass of a micro-batch; -> its mean loss."""
        live: DecoupledLive = state.live
        with live.worker.autocast():
            loss = self.objective(live.parts[-1], batch, clock)
        live.worker.backward(loss * weight)
        return loss.detach()

    def _micro(self, state: State, batch: Batch, clock: Clock, last: bool) -> Tensor:
        share = len(batch) / clock.batch
        return self.exchange(state, batch, clock, share * state.live.worker.size) * share

    def tell(self, state: State, name: str, share: Tensor) -> None:
        """Adds to a metric of this step."""
        told = state.live.told
        told[name] = told[name] + share if name in told else share

    def _apply(self, state: State, clock: Clock) -> None:
        Backprop._apply(self, state, clock)
        live: DecoupledLive = state.live
        grads = [p.grad for helper in live.helpers for p in helper.parameters() if p.grad is not None]
        if live.worker.size > 1 and grads:
            average_(grads, live.worker)
        for optimizer in live.helper_optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.helper_rate(clock) * group.get("rate_factor", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def settle(self, state: State) -> None:
        from strategies.decoupled.roles import share_out

        Backprop.settle(self, state)
        if state.live.line:
            share_out(state.live, state.live.line.worker)

    def finish(self, state: State) -> None:
        Backprop.finish(self, state)
        if state.live.line:
            state.live.line.close()


@dataclass(frozen=True, slots=True)
class OneEach:
    """An optimizer for each part, joined: they step at the same time."""

    optimizer: Any
    parts: Sequence[Net]

    def __call__(self, net: Net) -> Optimizer:
        from strategies.parts.joint_optimizer import JointOptimizer

        return JointOptimizer(*(self.optimizer(part) for part in self.parts))


def with_roles(plan: Plan, by: object, cuts: Sequence[int] | None) -> Plan:
    """The plan with a role for each module."""
    name = type(by).__name__
    if cuts is None:
        raise PlanError(f"{name}: roles need to know how many modules there are: state `cuts`")
    if plan.roles > 1:
        raise PlanError(f"{name}: the plan has {plan.roles} roles already: leave one of the two methods out")
    return dataclasses.replace(plan, roles=len(cuts) + 1)


def decouple(phase: Phase, by: object, cuts: Sequence[int] | None, kind: type[Decoupled], **options: Any) -> Phase:
    """The phase with its network cut, and a learner of this kind, made of its Backprop and the options."""
    name = type(by).__name__
    if cuts is not None and (sorted({*cuts}) != list(cuts) or any(cut < 1 for cut in cuts)):
        raise PlanError(f"{name}: cuts are {list(cuts)}, expected rising numbers of stages, from 1 on")
    learner: Any = amend(phase, by, updates=(Modules(),)).learner
    if type(learner) is not Backprop:
        raise PlanError(
            f"{name} and {type(learner).__name__} both change how phase '{phase.name}' learns: leave one of the two out"
        )
    if hasattr(phase.carry, "state"):
        raise PlanError(f"{name}: modules have optimizers of their own, which do not follow a network that grows: leave one "
                        "of the two methods out")  # fmt: skip
    if options.get("bf16_messages") and options["ahead"] is None:
        raise PlanError(f"{name}: bf16_messages are those between workers of different modules, but each worker has all of "
                        "them: leave it out")  # fmt: skip
    usual = {f.name: getattr(learner, f.name) for f in dataclasses.fields(Backprop)}
    spec = ModelSpec(network, (("model", phase.model), ("cuts", None if cuts is None else tuple(cuts))))
    return dataclasses.replace(phase, model=spec, learner=kind(**usual, **options))
