"""Steps and seconds to a test accuracy, `python -m benchmarks.to_accuracy`: SGD and K-FAC of bigbatch and of two libraries.

All train on the same 10,000 images of CIFAR-10 with crop and flip, in the same loop and order, at constant rates after an
epoch of warm-up. Each contender's rate is the one that came to the target in the fewest steps on one seed; what is told are
fresh seeds. A miss counts as infinitely many steps. Evaluation is not charged. For the libraries see `benchmarks.curvature`.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.curvature import CONTENDERS, Setting, begun, device, layout, plain, wait
from benchmarks.images import augmented, normalised
from orchestrator.files import read_json
from orchestrator.workloads import cifar10
from orchestrator.workloads.models import build_network
from strategies.net import Net
from strategies.rate import Rate

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "small_cnn": ("small_cnn", {"width": 8, "batch_norm": True}),
    "resnet8": ("resnet", {"depth": 8}),
}
PEAKS = (0.004, 0.01, 0.025, 0.063, 0.16, 0.4, 1.0, 2.5)
MAKERS = {"SGD": plain} | {name: CONTENDERS[name] for name in CONTENDERS if name != "bigbatch, ekfac"}
INTERVALS = (5, 20)  # of factors and of inverses, in steps
TRAIN, TEST, DAMPING, DECAY = 10_000, 5_000, 1e-2, 5e-4


class Data(NamedTuple):
    """Training images, not normalised, (n, 3, 32, 32) uint8, and labels; test images, normalised, and labels."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True, order=True)
class Outcome:
    steps: float
    seconds: float


NEVER = Outcome(math.inf, math.inf)


def read() -> Data:
    """Raises DataError where CIFAR-10 is not there."""
    parsed = cifar10.parse(cifar10.files())

    def images(pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))

    test = normalised(images(parsed.test_x[:TEST]))
    labels = [torch.from_numpy(y).long() for y in (parsed.train_y[:TRAIN], parsed.test_y[:TEST])]
    return Data(images(parsed.train_x[:TRAIN]), labels[0], test, labels[1])


def train(name: str, batch: int, peak: float, seed: int, most: float, data: Data, options: Namespace) -> Outcome:
    """One run, given up after `most` steps."""
    torch.manual_seed(seed)
    kind, settings = MODELS[options.model]
    net = begun(build_network((3, 32, 32), 10, kind, **settings), layout(name))
    steps, per_epoch = int(options.epochs * TRAIN / batch), round(TRAIN / batch)
    setting = Setting(batch, Rate(peak, warmup=1), DAMPING, INTERVALS, steps, batch / TRAIN, DECAY)
    step = MAKERS[name](net, setting)
    order = torch.cat([torch.randperm(TRAIN) for _ in range(math.ceil(options.epochs))])
    seconds = 0.0
    for number in range(1, int(min(steps, most)) + 1):
        start = time.perf_counter()
        chosen = order[(number - 1) * batch : number * batch]
        x = augmented(data.x[chosen]).to(device(), memory_format=layout(name))
        try:
            step(x, data.y[chosen].to(device()))
        except torch.linalg.LinAlgError:  # of weights that diverged: some contenders stop there
            return NEVER
        wait()
        seconds += time.perf_counter() - start
        if (number % per_epoch == 0 or number == steps) and accuracy(net, data, layout(name)) >= options.target:
            return Outcome(number, seconds)
    return NEVER


@torch.no_grad()
def accuracy(net: Net, data: Data, form: torch.memory_format) -> float:
    net.eval()
    parts = zip(data.test_x.split(500), data.test_y.split(500), strict=True)
    right = sum(int((net(x.to(device(), memory_format=form)).argmax(1).cpu() == y).sum()) for x, y in parts)
    net.train()
    return right / len(data.test_y)


def best_rate(name: str, batch: int, data: Data, options: Namespace) -> float:
    """Runs that can no longer win are given up, which changes no choice."""
    found = dict[float, Outcome]()
    for peak in PEAKS:
        most = min((outcome.steps for outcome in found.values()), default=math.inf)
        found[peak] = train(name, batch, peak, 0, most, data, options)
    return min(found, key=lambda peak: found[peak])


def chosen(options: Namespace) -> dict[tuple[str, int], float]:
    """Rates that earlier runs chose, by contender and batch."""
    earlier = [row for file in options.chosen for row in read_json(file)["results"]]
    return {(row["contender"], row["batch"]): row["peak"] for row in earlier}


def compare(batch: int, data: Data, options: Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """At one batch size. First all rates, then seed after seed, in which the contenders take turns."""
    peaks, skipped, given = dict[str, float](), dict[str, str](), chosen(options)
    for name in options.only or MAKERS:
        try:
            peaks[name] = given.get((name, batch)) or best_rate(name, batch, data, options)
        except common.Skipped as why:
            skipped[name] = str(why)
    runs: dict[str, list[Outcome]] = {name: [] for name in peaks}
    for seed in range(1, options.repeats + 1):
        for name, peak in peaks.items():
            runs[name].append(train(name, batch, peak, seed, math.inf, data, options))
    results = [
        {"contender": name, "batch": batch, "peak": peak, "runs": list(map(astuple, runs[name]))}
        for name, peak in peaks.items()
    ]
    return results, skipped


def row(result: dict[str, Any]) -> list[str]:
    told = [common.spread(list(values)).replace("inf", "never") for values in zip(*result["runs"], strict=True)]
    return [result["contender"], str(result["batch"]), f"{result['peak']:g}", *told]


def main(options: Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(options.threads)
    data, results = read(), []
    head = ["contender", "batch", "rate", f"steps to {options.target:.0%}", "seconds"]
    for batch in options.batch:
        found, skipped = compare(batch, data, options)
        common.tell(f"{options.model}, batch {batch}. {common.machine()}", head, list(map(row, found)), skipped)
        results += found
    return results


if __name__ == "__main__":
    parser = common.arguments(str(__doc__).splitlines()[0], repeats=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--model", choices=list(MODELS), default="small_cnn")
    parser.add_argument("--target", type=float, default=0.4, help="test accuracy")
    parser.add_argument("--epochs", type=float, default=16, help="at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chosen", type=Path, nargs="+", default=[], help="--json of earlier runs: their rates")
    parser.add_argument("--only", choices=list(MAKERS), action="append", help="a contender; again for more")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs, arguments.target, arguments.repeats, arguments.batch = 0.2, 0.05, 1, [512]
    common.save(arguments.json, main(arguments))
