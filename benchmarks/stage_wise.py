"""Peak memory and time of training stage by stage, beside training as a whole: `python -m benchmarks.stage_wise`.

A network is trained as a whole, and part by part for as many epochs each: with frozen parts computed in every step, and with
their features kept on file. Each sample is a study of its own in a fresh process, with one thread.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks import common
from benchmarks.images import write_data
from orchestrator.files import read_lines

TIMEOUT = 1800.0
STORES = ("off", "exact", "fp16", "uint8")
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # model, stage_wise
    "cnn8": ({"plain_cnn": {"stages": ["C3 C3 P", "C3 C3 P", "C3 C3 P"]}}, {"head": "own"}),
    "vgg": ({"vgg": {"depth": 11, "width": 32}}, {"cuts": [1, 2, 3, 4]}),
}
NOTHING = "nothing trained"
TESTS = 16
Sample: TypeAlias = "tuple[float, float]"
"""Seconds of training; the most bytes held."""


def recipe(data: Path, model: dict[str, Any], strategies: list[Any], options: Namespace) -> dict[str, Any]:
    return {
        "study": "stage_wise",
        "workload": {"data": {"npz": {"path": str(data)}}, "model": model, "evaluate": {"epochs": options.epochs}},
        "engine": "solo",
        "cluster": {"workers": 1, "threads": 1, "launcher": "solo"},
        "base": {"epochs": options.epochs, "batch": options.batch, "rate": {"peak": 0.01}},
        "strategies": strategies,
    }


def measure(told: dict[str, Any]) -> list[Sample]:
    folder = Path(tempfile.mkdtemp())
    (folder / "recipe.yaml").write_text(json.dumps(told))  # JSON is YAML
    command = ("orchestrator", "run", str(folder / "recipe.yaml"), "--output", str(folder))
    common.run([sys.executable, "-m", "benchmarks.peak_memory", str(folder / "peak"), *command], TIMEOUT)
    (rows,) = (read_lines(path) for path in (folder / "stage_wise").glob("trials/*/metrics.jsonl"))
    return [(rows[-1]["seconds"], float((folder / "peak").read_text()))]


def contenders(data: Path, network: str, options: Namespace) -> dict[str, common.Measure]:
    model, parts = NETWORKS[network]
    told = {"whole": recipe(data, model, [], options)}
    for store in STORES:
        told[f"by stages, cache {store}"] = recipe(data, model, [{"stage_wise": parts | {"cache": store}}], options)
    told[NOTHING] = told["whole"] | {"base": {"steps": 1, "batch": 2, "rate": {"peak": 0.01}}}
    return {name: partial(measure, one) for name, one in told.items()}


def rows(samples: dict[str, list[Sample]]) -> list[tuple[str, ...]]:
    """Memory beyond what the process holds when it trains nothing."""
    floor = statistics.median(peak for _, peak in samples.pop(NOTHING))
    lines: list[tuple[str, ...]] = []
    for name, found in samples.items():
        seconds, mega = [s for s, _ in found], [(peak - floor) / 1e6 for _, peak in found]
        ratios = [s / w for s, (w, _) in zip(seconds, samples["whole"], strict=True)]
        lines.append((name, common.spread(seconds), common.spread(ratios), common.spread(mega)))
    return lines


def images(folder: Path, count: int) -> tuple[Path, str]:
    """A file with the first training images and a few for tests, which are not measured; and what it holds."""
    told, path = write_data(folder / "whole.npz"), folder / "images.npz"
    with np.load(folder / "whole.npz") as whole:
        np.savez(path, **{name: whole[name][: count if name.startswith("train") else TESTS] for name in whole})
    return path, told


def main() -> None:
    parser = common.arguments(str(__doc__).splitlines()[0], repeats=3)
    parser.add_argument("--model", choices=list(NETWORKS), nargs="+", default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=float, default=2, help="of each part, and of the whole")
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.images, options.epochs, options.batch = 1, 64, 1, 16
    print(common.machine())
    head = ("training", "seconds", "of the whole", "MB")
    results = []
    with common.scratch() as folder:
        data, told = images(folder, options.images)
        for network in options.model:
            samples, skipped = common.interleave(contenders(data, network, options), options.repeats)
            results.append({"network": network, "samples": dict(samples), "skipped": skipped})
            size = f"{options.images} images of {told}, {options.epochs:g} epochs of each part, batch {options.batch}"
            common.tell(f"{network}, {size}", head, rows(samples), skipped)
            common.save(options.json, results)


if __name__ == "__main__":
    main()
