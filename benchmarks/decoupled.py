"""Modules on workers of their own beside backpropagation, DDP and a pipeline: `python -m benchmarks.decoupled`.

A perceptron cut in two. Told are examples per second and accuracy at equal time, and how much of the ideal speed-up is
reached: with K modules whose work takes 1 + sigma times that of backpropagation, K / (1 + sigma); for a pipeline of M
micro-batches, M / (M + K - 1) of that.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from orchestrator.files import read_lines
from orchestrator.workloads import mnist
from orchestrator.workloads.files import DataError

TIMEOUT = 1800.0  # seconds per run
MODULES, CUT, DEPTH = 2, 4, 7  # behind the third of six hidden layers: the first one needs no gradient of its input
PARTS = 4  # micro-batches of the pipeline
TEST, TESTS = 2000, 10  # test images, and how often they are looked at
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # key, options, and more where modules lie apart
    "pipeline": ("pipeline", {"micro_batches": PARTS, "roles": False}, {"roles": True}),
    "synthetic gradients": ("synthetic_gradient", {"queue": 1}, {"roles": True}),
    "synthetic gradients, low rank": ("synthetic_gradient", {"queue": 1, "synthesiser": "low_rank"}, {"roles": True}),
    "greedy": ("local_loss", {}, {"ahead": 2}),
    "delayed, DDG": ("delayed_gradient", {"variant": "ddg"}, {"ahead": 1}),
    "delayed, FR": ("delayed_gradient", {"variant": "fr"}, {"ahead": 1}),
}
BACKPROP = "backpropagation"
ALONE, THREADS, APART = "1x1", "1x2", "2x1"  # workers x threads
Sample = dict[str, Any]


def strategies(method: str, apart: bool) -> list[dict[str, Any]]:
    if method == BACKPROP:
        return []
    key, options, more = METHODS[method]
    return [{key: {"cuts": [CUT], **options, **(more if apart else {})}}]


def recipe(options: Namespace, data: str, method: str, mode: str) -> dict[str, Any]:
    workers, threads = map(int, mode.split("x"))
    return {
        "study": "decoupled",
        "workload": {
            "data": {"npz": {"path": data}},
            "model": {"mlp": {"width": options.width, "depth": DEPTH}},
            "evaluate": {"steps": max(1, options.steps // TESTS)},
        },
        "engine": "ddp",
        "cluster": {"workers": workers, "threads": threads},
        "precision": "fp32",
        "base": {"optimizer": {"adamw": {"weight_decay": 0}}, "steps": options.steps, "batch": options.batch,
                 "rate": {"peak": 0.0005}},
        "strategies": strategies(method, apart=mode == APART),
    }  # fmt: skip


def measure(options: Namespace, data: str, method: str, mode: str) -> Sample:
    """Of one run: examples per second from the first look at the test images on, and accuracies by the seconds of training."""
    study = common.bigbatch(recipe(options, data, method, mode), TIMEOUT)
    (file,) = study.glob("trials/*/metrics.jsonl")
    rows = read_lines(file)
    looks = [row for row in rows if "test_accuracy" in row]
    first, last = looks[0], looks[-1]
    ranks = [name for name in last if name.startswith("train_occupancy_")]
    return {
        "rate": (last["examples"] - first["examples"]) / (last["seconds"] - first["seconds"]),
        "curve": [(row["seconds"], row["test_accuracy"]) for row in looks],
        "occupancy": [statistics.median(row[name] for row in looks[1:]) for name in ranks],
    }


def samples_of(options: Namespace, data: str, method: str, mode: str) -> list[Sample]:
    """One worker with one thread is measured beside another one of its kind, as workers of two modules are."""
    if mode != ALONE:
        return [measure(options, data, method, mode)]
    with ThreadPoolExecutor(MODULES) as pool:
        both = [pool.submit(measure, options, data, method, mode) for _ in range(MODULES)]
        found = [one.result() for one in both]
    return [found[0] | {"rate": statistics.mean(one["rate"] for one in found)}]


# --------------------------------------------------------------------------------------------------------------- tables


def speeds(samples: Mapping[str, Sequence[Sample]]) -> list[tuple[str, ...]]:
    def rates(method: str, mode: str) -> list[float]:
        return [sample["rate"] for sample in samples[f"{method} {mode}"]]

    base, lines = rates(BACKPROP, ALONE), []
    for method in (BACKPROP, *METHODS):
        if any(f"{method} {mode}" not in samples for mode in (ALONE, THREADS, APART)):
            continue
        alone, apart = rates(method, ALONE), rates(method, APART)
        gains = [rate / one for rate, one in zip(apart, base, strict=True)]
        extra = statistics.median(one / rate - 1 for rate, one in zip(alone, base, strict=True))
        ideal = MODULES / (1 + extra) * (PARTS / (PARTS + MODULES - 1) if method == "pipeline" else 1)
        found = (*map(common.spread, (alone, rates(method, THREADS), apart, gains)), f"{extra:.2f}")
        lines.append((named(method, APART), *found, f"{ideal:.2f}", f"{statistics.median(gains) / ideal:.0%}",
                      occupied(samples[f"{method} {APART}"])))  # fmt: skip
    return lines


def named(method: str, mode: str) -> str:
    return f"{method}, apart: DDP" if (method, mode) == (BACKPROP, APART) else method


def occupied(found: Sequence[Sample]) -> str:
    """Of each rank."""
    by_rank = zip(*(sample["occupancy"] for sample in found), strict=True)
    return ", ".join(f"{statistics.median(rank):.0%}" for rank in by_rank) or "-"


def accuracies(samples: Mapping[str, Sequence[Sample]], seconds: float) -> list[tuple[str, ...]]:
    """Each contender's, after so many seconds of training, between the two looks around that time."""
    lines = []
    for name, found in samples.items():
        method, mode = name.rsplit(" ", 1)
        if mode != ALONE:
            at = [100 * float(np.interp(seconds, *zip(*sample["curve"], strict=True))) for sample in found]
            best = [100 * sample["curve"][-1][1] for sample in found]
            lines.append((named(method, mode), mode, common.spread(at, 4), common.spread(best, 4)))
    return lines


def equal_time(samples: Mapping[str, Sequence[Sample]]) -> float:
    """Seconds that all contenders but single threads have trained."""
    return min(s["curve"][-1][0] for name, found in samples.items() if not name.endswith(ALONE) for s in found)


# ----------------------------------------------------------------------------------------------------------------- data


def write_data(path: Path) -> str:
    """MNIST as an .npz file with fewer test images; -> what it holds: random pixels where MNIST is not there."""
    try:
        parsed = mnist.parse(mnist.files())
        arrays = parsed.train_x[..., 0], parsed.train_y, parsed.test_x[:TEST, ..., 0], parsed.test_y[:TEST]
        told = "MNIST"
    except DataError:
        noise = np.random.default_rng(0)
        pixels = [noise.integers(0, 256, (n, 28, 28), np.uint8) for n in (60_000, TEST)]
        arrays = pixels[0], np.arange(60_000) % 10, pixels[1], np.arange(TEST) % 10
        told = "random pixels of MNIST's shape, of which nothing can be learnt"
    train_x, train_y, test_x, test_y = arrays
    np.savez(path, train_x=train_x[:, None], train_y=train_y, test_x=test_x[:, None], test_y=test_y)
    return told


def main() -> None:
    parser = common.arguments(str(__doc__).splitlines()[0], repeats=3)
    parser.add_argument("--width", type=int, default=1024, help="units of each of six hidden layers")
    parser.add_argument("--batch", type=int, default=256, help="examples per step")
    parser.add_argument("--steps", type=int, default=235, help="steps of each run")
    options = parser.parse_args()
    if options.quick:
        options.width, options.steps, options.repeats = 16, 20, 1
    print(common.machine())
    with common.scratch() as folder:
        data = write_data(folder / "data.npz")
        contenders: dict[str, common.Measure] = {
            f"{method} {mode}": partial(samples_of, options, str(folder / "data.npz"), method, mode)
            for method in (BACKPROP, *METHODS) for mode in (ALONE, THREADS, APART)
        }  # fmt: skip
        samples, skipped = common.interleave(contenders, options.repeats)
    title = f"{DEPTH - 1} hidden layers of {options.width} in {MODULES} modules, batch {options.batch}, {data}"
    head = ("method", "1x1, examples/s", "1x2", "2x1", "2x1 over backpropagation 1x1", "sigma", "ideal", "of the ideal",
            "occupancy")  # fmt: skip
    common.tell(f"{title}; workers x threads, 2x1: each module on a worker", head, speeds(samples), skipped)
    seconds = equal_time(samples)
    head = ("method", "workers x threads", "test accuracy, per cent", "at its end")
    common.tell(f"After {common.short(seconds)} s of training", head, accuracies(samples, seconds), {})
    common.save(options.json, {"options": vars(options) | {"json": str(options.json)}, "data": data, "samples": samples,
                               "skipped": skipped})  # fmt: skip


if __name__ == "__main__":
    main()
