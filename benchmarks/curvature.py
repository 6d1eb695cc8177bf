"""K-FAC of bigbatch and of two libraries as steps on batches, for the benchmarks of natural gradients.

- asdl 0.1 (`asdfghjkl` on PyPI, in the extra `bench`), which runs with torch 2.13;
- kfac-pytorch, which has no release on PyPI: `pip install git+https://github.com/gpauloski/kfac-pytorch`.

Both take gradients to be contiguous, so their weights are; ours are channels-last. All Fisher matrices are empirical.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import common
from cluster.engines import make_worker
from strategies.backprop import Backprop
from strategies.contract import Batch, Clock, ModelSpec, Phase, Plan
from strategies.natural_gradient import NaturalGradient
from strategies.net import Net
from strategies.optimizers import Sgd
from strategies.rate import Rate

NEVER = 10**9  # steps

Step: TypeAlias = Callable[[Tensor, Tensor], object]
"""Images and labels -> one optimizer step."""


@dataclass(frozen=True)
class Setting:
    """What all contenders are given. Intervals, of factors and of inverses, are in steps."""

    batch: int
    rate: Rate
    damping: float
    intervals: tuple[int, int]
    steps: int = NEVER
    epochs_per_step: float = 0.01
    weight_decay: float = 0.0
    precision: str = "fp32"  # of bigbatch; the others take fp32

    def clock(self, step: int) -> Clock:
        return Clock(step, self.steps, step * self.epochs_per_step, self.epochs_per_step, self.batch, seed=0)

    def rate_at(self, step: int) -> float:
        return self.rate(self.clock(step))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def begun(net: Net, form: torch.memory_format) -> Net:
    """The network laid out so, with batch norms whose scales are 1: asdl makes no factors of one whose scale is 0."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return net.to(device(), memory_format=form)  # type: ignore[call-overload,no-any-return]


def bigbatch(strategy: NaturalGradient | None, net: Net, setting: Setting) -> Step:
    backprop = Backprop(optimizer=Sgd(weight_decay=setting.weight_decay), rate=setting.rate)
    plan = Plan((Phase(name="train", epochs=1, batch=setting.batch, model=ModelSpec(Net), learner=backprop),))
    learner: Any = (strategy.edit(plan) if strategy else plan).phases[0].learner
    state = learner.init(net, make_worker("solo", {}, setting.precision, 0, 1, device()))
    clocks, order = map(setting.clock, range(NEVER)), torch.arange(setting.batch, device=device())
    return lambda x, y: learner.step(state, [Batch(x, y, order)], next(clocks))


def plain(net: Net, setting: Setting) -> Step:
    return bigbatch(None, net, setting)


def ours(inverse: Any, net: Net, setting: Setting) -> Step:
    factors, inverses = setting.intervals
    eager = NEVER if inverses == 1 else 0  # intervals of 1, which ekfac does not take
    intervals: Any = {"eager": eager, "factors_every": factors, "inverses_every": max(inverses, 2)}
    return bigbatch(NaturalGradient(damping=setting.damping, inverse=inverse, **intervals), net, setting)


def asdl(net: Net, setting: Setting) -> Step:
    common.require("asdl")
    from asdl import KfacGradientMaker, PreconditioningConfig  # type: ignore[import-not-found,unused-ignore]

    if not torch.cuda.is_available():
        marks: Any = torch.cuda.nvtx  # for a profiler, which CPU builds of torch refuse
        marks.range = contextlib.nullcontext
    factors, inverses = setting.intervals
    intervals = {"curvature_upd_interval": factors, "preconditioner_upd_interval": inverses}
    config = PreconditioningConfig(data_size=setting.batch, damping=setting.damping, ema_decay=0.05, **intervals)
    optimizer, maker = Scheduled(net, setting), KfacGradientMaker(net, config, fisher_type="fisher_emp")

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        maker.setup_loss_call(cross_entropy, maker.setup_model_call(net, x), y)
        maker.forward_and_backward()
        optimizer.step()

    return step


def kfac_pytorch(method: str, net: Net, setting: Setting) -> Step:
    common.require("kfac", how="pip install git+https://github.com/gpauloski/kfac-pytorch")
    from kfac.preconditioner import KFACPreconditioner  # type: ignore[import-not-found,unused-ignore]

    factors, inverses = setting.intervals
    intervals = {"factor_update_steps": factors, "inv_update_steps": inverses}
    optimizer, options = Scheduled(net, setting), {"damping": setting.damping, "lr": setting.rate_at}
    preconditioner = KFACPreconditioner(net, compute_method=method, **options, **intervals)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        preconditioner.step()
        optimizer.step()

    return step


class Scheduled:
    """SGD with momentum at the setting's rates; weights with 2 dimensions or more decay, as ours do."""

    def __init__(self, net: nn.Module, setting: Setting):
        groups: list[dict[str, Any]] = [
            {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": setting.weight_decay},
            {"params": [p for p in net.parameters() if p.ndim < 2]},
        ]
        self.sgd, self.rates = torch.optim.SGD(groups, lr=0.0, momentum=0.9), map(setting.rate_at, range(NEVER))

    def zero_grad(self) -> None:
        self.sgd.zero_grad()

    def step(self) -> None:
        rate = next(self.rates)
        for group in self.sgd.param_groups:
            group["lr"] = rate
        self.sgd.step()


CONTENDERS: dict[str, Callable[[Net, Setting], Step]] = {
    **{f"bigbatch, {kind}": functools.partial(ours, kind) for kind in ("cholesky", "eigen", "ekfac")},
    "asdl, cholesky": asdl,
    **{f"kfac-pytorch, {kind}": functools.partial(kfac_pytorch, kind) for kind in ("inverse", "eigen")},
}


def layout(name: str) -> torch.memory_format:
    """Of a contender's weights and images."""
    return torch.contiguous_format if name.startswith(("asdl", "kfac")) else torch.channels_last


def wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
