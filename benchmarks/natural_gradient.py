"""What natural gradients add to a step of SGD, `python -m benchmarks.natural_gradient`: on ResNet-20, 32 x 32 images.

Steps are timed by what they make anew: nothing, factors, or factors and inverses; the cost at any intervals follows:
(plain + factors / f + inverses / i) / SGD. Beside bigbatch, in the same run and in fp32, empirical Fisher matrices of

- asdl 0.1 (`asdfghjkl` on PyPI, in the extra `bench`), which runs with torch 2.13. It makes none of a batch norm whose scale is
  0, so all contenders have scales of 1;
- kfac-pytorch, which has no release on PyPI: `pip install git+https://github.com/gpauloski/kfac-pytorch`.

Both take gradients to be contiguous, so their weights are; ours are channels-last.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import common
from cluster.engines import make_worker
from orchestrator.workloads.models import resnet
from strategies.backprop import Backprop
from strategies.contract import Batch, Clock, ModelSpec, Phase, Plan
from strategies.natural_gradient import NaturalGradient
from strategies.net import Net
from strategies.optimizers import Sgd
from strategies.rate import Rate

NEVER = 10**9  # after the first step
RENEWED = {"nothing": (NEVER, NEVER), "factors": (1, NEVER), "factors, inverses": (1, 1)}  # intervals in steps
INTERVALS = ((1, 1), (1, 10), (10, 100))
RATE, DAMPING = 0.01, 1e-3

Step: TypeAlias = Callable[[], object]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def begun(batch: int, layout: torch.memory_format = torch.channels_last) -> tuple[Net, Tensor, Tensor]:
    """The network, random images and labels."""
    torch.manual_seed(0)
    net = resnet((3, 32, 32), 10, depth=20).to(device(), memory_format=layout)  # type: ignore[call-overload]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    x = torch.randn(batch, 3, 32, 32, device=device()).to(memory_format=layout)
    return net, x, torch.randint(10, (batch,), device=device())


# ------------------------------------------------------------------------------------------------------ contenders


def bigbatch(strategy: NaturalGradient | None, options: Namespace) -> Step:
    net, x, y = begun(options.batch)
    backprop = Backprop(optimizer=Sgd(), rate=Rate(RATE))
    plan = Plan((Phase(name="train", epochs=1, batch=options.batch, model=ModelSpec(resnet), learner=backprop),))
    learner: Any = (strategy.edit(plan) if strategy else plan).phases[0].learner
    state = learner.init(net, make_worker("solo", {}, options.precision, 0, 1, device()))
    numbers, examples = iter(range(NEVER)), Batch(x, y, torch.arange(options.batch, device=device()))
    return lambda: learner.step(state, [examples], Clock(next(numbers), NEVER, 0.0, 0.01, options.batch, seed=0))


def ours(inverse: Any, factors: int, inverses: int, options: Namespace) -> Step:
    eager = NEVER if inverses == 1 else 0  # intervals of 1, which ekfac does not take
    intervals: Any = {"eager": eager, "factors_every": factors, "inverses_every": max(inverses, 2)}
    return bigbatch(NaturalGradient(damping=DAMPING, inverse=inverse, **intervals), options)


def asdl(factors: int, inverses: int, options: Namespace) -> Step:
    common.require("asdl")
    from asdl import KfacGradientMaker, PreconditioningConfig  # type: ignore[import-not-found,unused-ignore]

    if not torch.cuda.is_available():
        marks: Any = torch.cuda.nvtx  # for a profiler, which CPU builds of torch refuse
        marks.range = contextlib.nullcontext
    net, x, y = begun(options.batch, torch.contiguous_format)
    intervals = {"curvature_upd_interval": factors, "preconditioner_upd_interval": inverses}
    config = PreconditioningConfig(data_size=options.batch, damping=DAMPING, ema_decay=0.05, **intervals)
    optimizer, maker = sgd(net), KfacGradientMaker(net, config, fisher_type="fisher_emp")

    def step() -> None:
        optimizer.zero_grad()
        maker.setup_loss_call(cross_entropy, maker.setup_model_call(net, x), y)
        maker.forward_and_backward()
        optimizer.step()

    return step


def kfac_pytorch(method: str, factors: int, inverses: int, options: Namespace) -> Step:
    common.require("kfac", how="pip install git+https://github.com/gpauloski/kfac-pytorch")
    from kfac.preconditioner import KFACPreconditioner  # type: ignore[import-not-found,unused-ignore]

    net, x, y = begun(options.batch, torch.contiguous_format)
    intervals = {"factor_update_steps": factors, "inv_update_steps": inverses}
    optimizer = sgd(net)
    preconditioner = KFACPreconditioner(net, damping=DAMPING, lr=RATE, compute_method=method, **intervals)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        preconditioner.step()
        optimizer.step()

    return step


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)


CONTENDERS: dict[str, Callable[[int, int, Namespace], Step]] = {
    **{f"bigbatch, {kind}": functools.partial(ours, kind) for kind in ("cholesky", "eigen", "ekfac")},
    "asdl, cholesky": asdl,
    **{f"kfac-pytorch, {kind}": functools.partial(kfac_pytorch, kind) for kind in ("inverse", "eigen")},
}


# --------------------------------------------------------------------------------------------------------- measuring


class Timed:
    """Seconds of a step, in a list. The first call makes the contender and takes two steps: the first makes all anew, the
    second ekfac's eigenvalues."""

    def __init__(self, make: Callable[[], Step]):
        self.make = make
        self.step: Step | None = None

    def __call__(self) -> list[float]:
        if self.step is None:
            self.step = self.make()
            self.step()
            self.step()
        wait()
        start = time.perf_counter()
        self.step()
        wait()
        return [time.perf_counter() - start]


def wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def cost(times: Sequence[float], intervals: tuple[int, int]) -> float:
    """Seconds per step on average, of times in the order of RENEWED."""
    plain, factors, both = times
    return plain + (factors - plain) / intervals[0] + (both - factors) / intervals[1]


def main(options: Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    measures = {"SGD": Timed(lambda: bigbatch(None, options))}
    for name in options.only or CONTENDERS:
        for renewed, intervals in RENEWED.items():
            measures[f"{name}: {renewed}"] = Timed(functools.partial(CONTENDERS[name], *intervals, options))
    samples, skipped = common.interleave(measures, 1 if options.quick else options.repeats)
    rows = [[name, common.spread(found)] for name, found in samples.items()]
    common.tell(f"Seconds per step. {common.machine()}", ["made anew", "seconds"], rows, skipped)
    told = []
    for name in CONTENDERS:
        if f"{name}: nothing" in samples:
            times = [statistics.median(samples[f"{name}: {renewed}"]) for renewed in RENEWED]
            in_steps = [cost(times, pair) / statistics.median(samples["SGD"]) for pair in INTERVALS]
            told.append([name, *(common.short(value) for value in in_steps)])
    head = ["factors, inverses every", *(f"{f}, {i}" for f, i in INTERVALS)]
    common.tell("Steps of SGD per step", head, told, {})
    return samples


if __name__ == "__main__":
    parser = common.arguments(str(__doc__).splitlines()[0], repeats=5)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of bigbatch; the others take fp32"
    )
    parser.add_argument("--only", choices=list(CONTENDERS), action="append", help="a contender; again for more")
    arguments = parser.parse_args()
    common.save(arguments.json, main(arguments))
