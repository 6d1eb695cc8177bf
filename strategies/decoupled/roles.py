"""Modules on workers of their own: each worker builds the whole network and trains the one module of its role."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from strategies.contract import Pending, PlanError, Worker
from strategies.parts.replicas import average_, copy_, tensors_in

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from strategies.decoupled.boundary import CutNet
    from strategies.decoupled.learner import DecoupledLive


class OneRole:
    """A worker as the learner of one module sees it: the only others are those of the same role, one in each replica."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.rank, self.size = worker.replica, worker.replicas

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)

    def sum_(self, t: Tensor) -> Tensor:
        return self.worker.sum_role_(t)

    def apply(
        self, model: nn.Module, optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        """Only this role's parameters have gradients; the others' stay."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if self.size > 1:
            average_([p.grad for p in params if p.grad is not None], self)
        before()
        optimizer.step()
        after()
        optimizer.zero_grad(set_to_none=True)


class Message:
    """A tensor on its way from or to a neighbour. The time spent in waiting for it is its line's idle time."""

    def __init__(self, line: Line, under_way: Pending, sent: Tensor, wanted: Tensor):
        self.line, self.under_way, self.sent, self.wanted = line, under_way, sent, wanted

    def wait(self) -> None:
        begun = time.perf_counter()
        self.under_way.wait()
        self.line.idle += time.perf_counter() - begun
        if self.sent is not self.wanted:
            self.wanted.copy_(self.sent)


class Line:
    """Messages between this worker's module and its neighbours'.

    Activations go up and gradients down, a message for each micro-batch. At most as many batches of messages as `begin` is
    told wait on their way to a neighbour. A learner asks for all that it will be sent before it waits for anything that this
    could hold up, so that modules cannot wait for each other in a circle: of all workers, one that is furthest behind finds
    what it needs sent already, and what it sends asked for.

    `idle`: seconds of this step spent in waiting for neighbours. With `bf16`, messages are rounded to it.
    """

    def __init__(self, worker: Worker, net: CutNet, bf16: bool = False):
        import torch

        self.worker, self.shapes, self.role = worker, net.shapes, worker.role
        self.like = next(net.parameters())
        self.dtype = torch.bfloat16 if bf16 else self.like.dtype
        self.sent: dict[int, deque[Message]] = {}
        self.posted: tuple[Tensor, Message] | None = None
        self.lengths: list[int] = []

    def begin(self, lengths: list[int], ahead: int) -> None:
        """A step with micro-batches of these lengths, which are those of all steps of a phase."""
        self.lengths, self.most, self.taken = lengths, ahead * len(lengths), 0
        self.begun, self.idle = time.perf_counter(), 0.0

    def occupancy(self) -> float:
        """The share of this step, so far, that was not spent in waiting for neighbours."""
        return 1 - self.idle / (time.perf_counter() - self.begun)

    def send(self, t: Tensor | None, role: int) -> None:
        """Returns at once, unless too many messages wait: then the neighbour has to catch up first."""
        assert t is not None, "a module's input has a gradient"
        t = t.detach().to(self.dtype).contiguous()
        waiting = self.sent.setdefault(role, deque())
        waiting.append(Message(self, self.worker.send(t, role), t, t))
        while len(waiting) > self.most:
            waiting.popleft().wait()

    def expect(self, shape: Sequence[int], role: int) -> tuple[Tensor, Message]:
        """Room for the next message of a neighbour that was not asked for yet, filled once it has been waited for."""
        wanted = self.like.new_empty(shape, requires_grad=False)
        room = wanted if self.dtype == wanted.dtype else wanted.to(self.dtype)
        return wanted, Message(self, self.worker.recv(room, role), room, wanted)

    def take(self) -> Tensor:
        """Activations from below; those that come next are asked for, so that they are received meanwhile."""
        t, message = self.posted or self._post(0)
        self.taken += 1
        self.posted = self._post(self.taken % len(self.lengths))
        message.wait()
        return t

    def _post(self, number: int) -> tuple[Tensor, Message]:
        return self.expect((self.lengths[number], *self.shapes[self.role - 1]), self.role - 1)

    def close(self, taken: bool = True) -> None:
        """Until all messages have arrived; an empty one for the neighbour above where it has `taken` all others."""
        if self.lengths and taken and self.role < len(self.shapes):
            self.send(self.like.new_zeros(self.lengths[0], *self.shapes[self.role]), self.role + 1)
        if self.posted:
            self.posted[1].wait()
        for message in (message for waiting in self.sent.values() for message in waiting):
            message.wait()
        self.posted, self.sent, self.lengths = None, {}, []


def one_role(worker: Worker, modules: int) -> OneRole:
    """Raises PlanError where roles and modules differ."""
    if worker.roles != modules:
        raise PlanError(f"the network is cut into {modules} modules, but the plan has {worker.roles} roles")
    return OneRole(worker)


def share_out(live: DecoupledLive, worker: Worker) -> None:
    """What the workers of each role have learnt becomes that of all: weights, running statistics, optimizers' states.

    By one collective for each role, dtype and kind; before it, running statistics are averaged over replicas.
    """
    import torch

    if live.worker.size > 1:
        average_([b for b in live.parts[worker.role].buffers() if b.is_floating_point()], live.worker)
    held = torch.zeros(len(live.parts), 2, dtype=torch.float64, device=worker.device)
    optimizers = [_optimizers(live, role) for role in range(len(live.parts))]
    if worker.replica == 0:
        for kind, optimizer in enumerate(optimizers[worker.role]):
            held[worker.role, kind] = len(list(tensors_in(optimizer.state_dict())))
    worker.sum_(held)
    for role, modules in enumerate(_modules(live, role) for role in range(len(live.parts))):
        for optimizer, count in zip(optimizers[role], held[role].tolist(), strict=False):
            if count and not list(tensors_in(optimizer.state_dict())):
                _begin(optimizer)
        state = [t for o, n in zip(optimizers[role], held[role].tolist(), strict=False) if n
                 for t in tensors_in(o.state_dict())]  # fmt: skip
        learnt = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        copy_([*learnt, *state], worker, role)


def _modules(live: DecoupledLive, role: int) -> Sequence[nn.Module]:
    return [live.parts[role], *live.helpers[role : role + 1]]


def _optimizers(live: DecoupledLive, role: int) -> Sequence[Optimizer]:
    parts: Any = live.optimizer
    return [parts.parts[role], *live.helper_optimizers[role : role + 1]]


def _begin(optimizer: Optimizer) -> None:
    """A step, so that there is a state to fill; the weights that it touches are filled, too."""
    import torch

    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
