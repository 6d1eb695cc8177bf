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


class Timed:
    """A message whose waits count as its line's idle time."""

    def __init__(self, message: Pending, line: Line):
        self.message, self.line = message, line

    def wait(self) -> None:
        begun = time.perf_counter()
        self.message.wait()
        self.line.idle += time.perf_counter() - begun


class Line:
    """Messages between this worker's module and its neighbours'.

    Activations go up and gradients down, a message for each micro-batch; what comes next from below is awaited one message
    ahead. At most as many batches of messages as `begin` is told wait on their way to a neighbour. `idle`: seconds spent in
    waiting for neighbours, which the learner tells and sets to zero.
    """

    idle = 0.0

    def __init__(self, worker: Worker, net: CutNet):
        self.worker, self.shapes, self.role = worker, net.shapes, worker.role
        self.like = next(net.parameters())
        self.sent: dict[int, deque[tuple[Tensor, Pending]]] = {}
        self.posted: tuple[Tensor, Pending] | None = None
        self.lengths: list[int] = []

    def begin(self, lengths: list[int], ahead: int) -> None:
        """A step with micro-batches of these lengths, which are those of all steps of a phase."""
        self.lengths, self.most, self.taken = lengths, ahead * len(lengths), 0

    def send(self, t: Tensor | None, role: int) -> None:
        """Returns at once, unless too many messages wait: then the neighbour has to catch up first."""
        assert t is not None, "a module's input has a gradient"
        t = t.detach().to(self.like.dtype).contiguous()
        waiting = self.sent.setdefault(role, deque())
        waiting.append((t, Timed(self.worker.send(t, role), self)))
        while len(waiting) > self.most:
            waiting.popleft()[1].wait()

    def take(self) -> Tensor:
        """Activations from below."""
        t, pending = self.posted or self._post(0)
        self.taken += 1
        self.posted = self._post(self.taken % len(self.lengths))
        pending.wait()
        return t

    def expect(self, h: Tensor) -> tuple[Tensor, Pending]:
        """Room for what comes back from above for `h`."""
        t = self.like.new_empty(h.shape, requires_grad=False)
        return t, Timed(self.worker.recv(t, self.role + 1), self)

    def _post(self, number: int) -> tuple[Tensor, Pending]:
        t = self.like.new_empty(self.lengths[number], *self.shapes[self.role - 1], requires_grad=False)
        return t, Timed(self.worker.recv(t, self.role - 1), self)

    def close(self) -> None:
        """Until all messages have arrived; an empty one for the neighbour above, which awaits the next."""
        if self.lengths and self.role < len(self.shapes):
            self.send(self.like.new_zeros(self.lengths[0], *self.shapes[self.role]), self.role + 1)
        if self.posted:
            self.posted[1].wait()
        for _, pending in (message for waiting in self.sent.values() for message in waiting):
            pending.wait()
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
