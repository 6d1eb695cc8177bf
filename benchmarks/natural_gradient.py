"""What natural gradients add to a step of SGD, `python -m benchmarks.natural_gradient`: on ResNet-20, 32 x 32 images.

Steps are timed by what they make anew: nothing, factors, or factors and inverses; the cost at any intervals follows:
(plain + factors / f + inverses / i) / SGD. Beside bigbatch, in the same run and in fp32, two libraries: see
`benchmarks.curvature`.
"""

from __future__ import annotations

import functools
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import common
from benchmarks.curvature import CONTENDERS, NEVER, Setting, Step, begun, device, layout, plain, wait
from orchestrator.workloads.models import resnet
from strategies.net import Net
from strategies.rate import Rate

RENEWED = {"nothing": (NEVER, NEVER), "factors": (1, NEVER), "factors, inverses": (1, 1)}  # intervals in steps
INTERVALS = ((1, 1), (1, 10), (10, 100))
RATE, DAMPING = 0.01, 1e-3


def one_step(
    make: Callable[[Net, Setting], Step], intervals: tuple[int, int], form: torch.memory_format, options: Namespace
) -> Callable[[], object]:
    """One step of a contender, on the network, random images and labels that all have."""
    torch.manual_seed(0)
    net = begun(resnet((3, 32, 32), 10, depth=20), form)
    x = torch.randn(options.batch, 3, 32, 32, device=device()).to(memory_format=form)
    y = torch.randint(10, (options.batch,), device=device())
    step = make(net, Setting(options.batch, Rate(RATE), DAMPING, intervals, precision=options.precision))
    return lambda: step(x, y)


# --------------------------------------------------------------------------------------------------------- measuring


class Timed:
    """Seconds of a step, in a list. The first call makes the contender and takes two steps: the first makes all anew, the
    second ekfac's eigenvalues."""

    def __init__(self, make: Callable[[], Callable[[], object]]):
        self.make = make
        self.step: Callable[[], object] | None = None

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


def cost(times: Sequence[float], intervals: tuple[int, int]) -> float:
    """Seconds per step on average, of times in the order of RENEWED."""
    plain, factors, both = times
    return plain + (factors - plain) / intervals[0] + (both - factors) / intervals[1]


def main(options: Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    measures = {"SGD": Timed(lambda: one_step(plain, (1, 1), layout("SGD"), options))}
    for name in options.only or CONTENDERS:
        for renewed, intervals in RENEWED.items():
            one = functools.partial(one_step, CONTENDERS[name], intervals, layout(name), options)
            measures[f"{name}: {renewed}"] = Timed(one)
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
