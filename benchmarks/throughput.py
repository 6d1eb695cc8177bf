"""Images per second of bigbatch's trainer beside other ways to write the same training: `python -m benchmarks.throughput`."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.contenders import CONTENDERS, PACKAGES, Spec
from benchmarks.images import NETWORKS, build, flops_per_image, write_data
from orchestrator.files import read_lines

MODES = {"2x1": (2, 1), "1x2": (1, 2)}  # workers x threads
TIMEOUT = 1800.0  # seconds per measurement
FREED = ("lightning", "tuned")  # measured with KEPT too
WORTH = 1.2  # how much faster bf16's matrix products must be for the peers to train in it


# glibc keeps what is freed, as `speed: {keep_memory: true}` has it: what of bigbatch's gain is due to this alone?
KEPT = {"MALLOC_MMAP_THRESHOLD_": "2147483647", "MALLOC_TRIM_THRESHOLD_": "2147483647"}


def peer(name: str, spec: Spec, workers: int, threads: int, **variables: str) -> list[float]:
    """Images per second of a contender in fresh processes."""
    common.require(*PACKAGES.get(name, ()))
    return [child(name, spec, workers, threads, **variables)["images_per_second"]]


def child(name: str, spec: Spec, workers: int, threads: int, **variables: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        spec_file, out_file = Path(folder) / "spec.json", Path(folder) / "out.json"
        spec_file.write_text(json.dumps(asdict(spec)))
        command = common.python("benchmarks.contenders", name, str(spec_file), str(out_file), workers=workers)
        common.run(command, TIMEOUT, OMP_NUM_THREADS=str(threads), GLOO_SOCKET_IFNAME="lo", **variables)
        return json.loads(out_file.read_text())


def bigbatch(spec: Spec, workers: int, threads: int, **changes: Any) -> list[float]:
    """Images per second of a recipe."""
    return [spec.batch * spec.steps / sum(windows) for windows in window_seconds(spec, workers, threads, **changes)]


def window_seconds(spec: Spec, workers: int, threads: int, **changes: Any) -> list[list[float]]:
    """From row to row of each trial, from the last step that warms up to the last of all; without evaluation, as in the
    peers' loops."""
    study = common.bigbatch(recipe(spec, workers, threads) | changes, TIMEOUT)
    trials = (
        {row["step"]: row["seconds"] for row in read_lines(file)} for file in study.glob("trials/*/metrics.jsonl")
    )
    found = []
    for seconds in trials:
        if not {spec.warmup, spec.warmup + spec.steps} <= seconds.keys():
            raise SystemExit(f"a trial ended before its last step, so its steps tell nothing: {study}")
        found.append([seconds[end] - seconds[start] for start, end in pairwise(seconds) if start >= spec.warmup])
    return found


def recipe(spec: Spec, workers: int, threads: int) -> dict[str, Any]:
    last = spec.warmup + spec.steps
    ((name, options),) = NETWORKS[spec.model].items()
    model = {name: options | ({"width": spec.width} if spec.width else {})}
    augment = {"crop": 4, "flip": True}
    return {
        "study": "throughput",
        "workload": {
            "data": {"npz": {"path": spec.data}}, "model": model, "augment": augment, "evaluate": {"steps": last}
        },
        "engine": "ddp",
        "cluster": {"workers": workers, "threads": threads},
        "base": {
            "optimizer": {"sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}},
            "steps": last,
            "batch": spec.batch,
            "rate": {"peak": 1e-3},  # small, so that nothing diverges on random pixels; the seconds do not depend on it
        },
        "log_steps": spec.warmup,
    }  # fmt: skip


def compare(spec: Spec, mode: str, repeats: int) -> dict[str, Any]:
    """All samples of one network in one mode, with the machine's peaks measured among them."""
    workers, threads = MODES[mode]
    contenders: dict[str, common.Measure] = {"peak": lambda: [child("peak", spec, 1, workers * threads)]}
    contenders["bigbatch"] = partial(bigbatch, spec, workers, threads)
    plain = {"speed": {"patch_convolutions": False, "keep_memory": False}}
    contenders["bigbatch, torch's own operations"] = partial(bigbatch, spec, workers, threads, **plain)
    contenders |= {name: partial(peer, name, spec, workers, threads) for name in CONTENDERS}
    contenders |= {f"{name}, memory kept": partial(peer, name, spec, workers, threads, **KEPT) for name in FREED}
    samples, skipped = common.interleave(contenders, repeats)
    peaks = samples.pop("peak")
    peak = {kind: statistics.median(sample[kind] for sample in peaks) for kind in ("fp32", "bf16")}
    gflops = flops_per_image(build(spec.model, spec.width)) / 1e9
    facts = {"model": spec.model, "mode": mode, "peak": peak, "gflops_per_image": gflops}
    return facts | {"samples": samples, "skipped": skipped}


def rows(result: dict[str, Any]) -> Sequence[Sequence[str]]:
    best = max(result["peak"].values()) / 1e9
    own = result["samples"].get("bigbatch")
    lines = []
    for name, rates in result["samples"].items():
        gflops = statistics.median(rates) * result["gflops_per_image"]
        ratio = common.spread([a / b for a, b in zip(own, rates, strict=True)]) if own else "-"
        lines.append((name, common.spread(rates), f"{gflops:.3g}", f"{gflops / best:.1%}", ratio))
    return lines


def title(result: dict[str, Any], spec: Spec, data: str) -> str:
    peak = ", ".join(f"{kind} {value / 1e12:.3g}" for kind, value in result["peak"].items())
    return (f"{result['model']}, {result['mode']} (workers x threads), global batch {spec.batch}, {data}; "
            f"peers in {spec.precision}; matmul peaks in TFLOP/s: {peak}")  # fmt: skip


def main() -> None:
    parser = common.arguments(__doc__ or "", repeats=5)
    parser.add_argument("--model", choices=[*NETWORKS, "all"], default="all")
    parser.add_argument("--mode", choices=[*MODES, "all"], default="all", help="workers x threads")
    parser.add_argument("--steps", type=int, default=6, help="measured steps per sample, after two to warm up")
    options = parser.parse_args()
    models = list(NETWORKS) if options.model == "all" else [options.model]
    modes = list(MODES) if options.mode == "all" else [options.mode]
    head = ("contender", "images/s", "GFLOP/s", "of the peak", "bigbatch / it")
    print(common.machine())
    with common.scratch() as folder:
        data = write_data(folder / "data.npz")
        spec = Spec(str(folder / "data.npz"), "", None, 512, 2, options.steps, "fp32")
        if options.quick:
            spec, options.repeats = replace(spec, width=8, batch=32, warmup=1, steps=1), 1
        peaks = child("peak", spec, 1, 2)
        spec = replace(spec, precision="bf16" if peaks["bf16"] > WORTH * peaks["fp32"] else "fp32")
        results = []
        for model in models:
            for mode in modes:
                result = compare(replace(spec, model=model), mode, options.repeats)
                common.tell(title(result, spec, data), head, rows(result), result["skipped"])
                results.append(result | {"data": data, "spec": asdict(spec)})
                common.save(options.json, results)


if __name__ == "__main__":
    main()
