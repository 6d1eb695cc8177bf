"""What natural_gradient adds to a step of SGD, `python -m benchmarks.natural_gradient`: on ResNet-20, 32 x 32 images.

Steps are timed by what they make anew; the cost at any intervals follows: (plain + factors / f + inverses / i) / SGD.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from cluster.engines import make_worker
from orchestrator.workloads.models import resnet
from strategies.backprop import Backprop
from strategies.contract import Batch, Clock, ModelSpec, Phase, Plan
from strategies.natural_gradient import NaturalGradient
from strategies.optimizers import Sgd
from strategies.rate import Rate

STEPS = {"plain": 1, "factors": 10, "factors, inverses": 100}  # a step in which just that is due at 10 / 100
INTERVALS = ((1, 1), (1, 10), (10, 100))


def step(strategy: NaturalGradient | None, precision: str, batch: int) -> Callable[[int], float]:
    """Takes a step of a number, and tells its seconds."""
    torch.manual_seed(0)
    backprop = Backprop(optimizer=Sgd(), rate=Rate(0.01))
    plan = Plan((Phase(name="train", epochs=1, batch=batch, model=ModelSpec(resnet), learner=backprop),))
    learner: Any = (strategy.edit(plan) if strategy else plan).phases[0].learner
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = resnet((3, 32, 32), 10, depth=20).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = learner.init(net, make_worker("solo", {}, precision, 0, 1, device))
    x = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    examples = Batch(x, torch.randint(10, (batch,), device=device), torch.arange(batch, device=device))

    def timed(number: int) -> float:
        wait(device)
        start = time.perf_counter()
        learner.step(state, [examples], Clock(number, 1000, 0.0, 0.01, batch, seed=0))
        wait(device)
        return time.perf_counter() - start

    timed(0)
    return timed


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(options: Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    natural = NaturalGradient(eager=0, factors_every=10, inverses_every=100, inverse=options.inverse)
    kinds = {"SGD": (step(None, options.precision, options.batch), 1)}
    of_natural = step(natural, options.precision, options.batch)
    kinds |= {name: (of_natural, number) for name, number in STEPS.items()}
    repeats = 1 if options.quick else options.repeats
    measures = {name: lambda timed=timed, number=number: [timed(number)] for name, (timed, number) in kinds.items()}
    samples, _ = common.interleave(measures, repeats)
    rows = [[name, common.spread(found)] for name, found in samples.items()]
    common.tell(f"Seconds per step, {options.inverse}. {common.machine()}", ["step", "seconds"], rows, {})
    sgd, plain, factors, both = (statistics.median(samples[name]) for name in ("SGD", *STEPS))
    costs = {(f, i): (plain + (factors - plain) / f + (both - factors) / i) / sgd for f, i in INTERVALS}
    told = [[f"{f} / {i}", common.short(cost)] for (f, i), cost in costs.items()]
    common.tell("Steps of SGD per step", ["factors, inverses every", "times"], told, {})
    return samples


if __name__ == "__main__":
    parser = common.arguments(str(__doc__).splitlines()[0], repeats=5)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--inverse", choices=["cholesky", "eigen", "ekfac"], default="cholesky")
    arguments = parser.parse_args()
    common.save(arguments.json, main(arguments))
