"""Seconds from a typed command to its answer or its first training step: `python -m benchmarks.cold_start`."""

from __future__ import annotations

import json
import sys
import time
from functools import partial

from benchmarks import common
from benchmarks.overhead import tiny
from orchestrator.files import read_lines

TIMEOUT = 300.0  # seconds per measurement
RECIPE = "recipes/quickstart.yaml"


def answer(*arguments: str) -> list[float]:
    """Seconds of a command that only answers."""
    start = time.perf_counter()
    common.run([sys.executable, "-m", "orchestrator", *arguments], TIMEOUT)
    return [time.perf_counter() - start]


def first_step(launcher: str, workers: int) -> list[float]:
    """Seconds from the start of `bigbatch run` to the end of its first optimizer step; a gang starts its own Ray."""
    if launcher == "gang":
        common.require("ray")
    recipe = tiny(cluster={"workers": workers, "threads": 1, "launcher": launcher})
    start = time.time()
    study = common.bigbatch(recipe, TIMEOUT)
    ended = next(event["time"] for event in read_lines(study / "journal.jsonl") if event["event"] == "trial_ended")
    (result,) = (json.loads(path.read_text()) for path in study.glob("trials/*/result.json"))
    return [ended - result["seconds"]["eval"] - start]  # evaluation comes after the step, and is not counted


def main() -> None:
    options = common.arguments(__doc__ or "", repeats=7).parse_args()
    repeats = 1 if options.quick else options.repeats
    print(common.machine())
    with common.scratch():
        contenders: dict[str, common.Measure] = {
            "bigbatch --help": partial(answer, "--help"),
            f"bigbatch validate {RECIPE}": partial(answer, "validate", RECIPE),
            "bigbatch run to the first step, solo": partial(first_step, "solo", 1),
            "bigbatch run to the first step, 2 workers in a new local Ray": partial(first_step, "gang", 2),
            "python -c 'import torch'": partial(imports, "torch"),
        }
        samples, skipped = common.interleave(contenders, repeats)
        rows = [(name, common.spread(found), str(len(found))) for name, found in samples.items()]
        common.tell("Cold start", ("command", "seconds", "samples"), rows, skipped)
        common.save(options.json, {"samples": samples, "skipped": skipped})


def imports(package: str) -> list[float]:
    start = time.perf_counter()
    common.run([sys.executable, "-c", f"import {package}"], TIMEOUT)
    return [time.perf_counter() - start]


if __name__ == "__main__":
    main()
