"""Two workers against one: weak and strong scaling, and what communication takes: `python -m benchmarks.scaling`."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.contenders import Spec
from benchmarks.images import NETWORKS, write_data
from benchmarks.throughput import bigbatch, window_seconds

LOCAL = (32, 256)  # images per worker and step
APART, IN_STEP = "2 workers, apart", "2 workers, apart, each step as long as the slower one's"


@dataclass(frozen=True)
class Case:
    """One recipe: so many workers with one thread each, with so many images per step, gradients sent in such a way."""

    workers: int
    batch: int
    engine: dict[str, Any] | str = "ddp"


def cases(local: int) -> dict[str, Case]:
    """Weak scaling keeps the images per worker, strong scaling those per step."""
    options = {"bf16": {"compression": "bf16"}, "PowerSGD": {"compression": {"powersgd": {"rank": 2, "start": 2}}}}
    return {
        "1 worker": Case(1, local),
        "1 worker, twice the batch": Case(1, 2 * local),
        "2 workers": Case(2, 2 * local),
        **{f"2 workers, {name}": Case(2, 2 * local, {"ddp": ddp}) for name, ddp in options.items()},
        "2 workers, one bucket": Case(2, 2 * local, {"ddp": {"bucket_mib": 1024}}),
    }


def measure(spec: Spec, case: Case) -> list[float]:
    return bigbatch(replace(spec, batch=case.batch), case.workers, 1, engine=case.engine)


def pair(spec: Spec, local: int) -> tuple[float, float]:
    """Images per second of two workers under one driver that do not speak with each other; the same if each of their steps
    took as long as the slower of the two, which is what sharing gradients costs at least."""
    cluster = {"workers": 1, "threads": 1, "launcher": "gang", "gangs": 2}
    one, other = window_seconds(replace(spec, batch=local), 1, 1, cluster=cluster, seeds=2, log_steps=1)
    own = spec.steps * local * (1 / sum(one) + 1 / sum(other))
    return own, 2 * local * spec.steps / sum(map(max, one, other))


def rows(samples: dict[str, list[float]]) -> list[tuple[str, ...]]:
    one, alone = samples["1 worker"], samples[APART]
    lines = []
    for name, rates in samples.items():
        speedup = common.spread([rate / base for rate, base in zip(rates, one, strict=True)])
        silent = [1 - rate / most for rate, most in zip(rates, alone, strict=True)]
        share = f"{statistics.median(silent):.1%}" if name.startswith("2 workers") else "-"
        lines.append((name, common.spread(rates), speedup, share))
    return lines


def main() -> None:
    parser = common.arguments(__doc__ or "", repeats=5)
    parser.add_argument("--model", choices=list(NETWORKS), default="resnet18")
    parser.add_argument("--local", type=int, nargs="+", default=LOCAL, help="images per worker and step")
    parser.add_argument("--steps", type=int, default=6, help="measured steps per sample, after two to warm up")
    options = parser.parse_args()
    print(common.machine())
    head = ("case", "images/s", "of 1 worker", "lost against apart")
    with common.scratch() as folder:
        data = write_data(Path(folder) / "data.npz")
        spec = Spec(str(Path(folder) / "data.npz"), options.model, None, 0, 2, options.steps, "auto")
        if options.quick:
            spec, options.repeats, options.local = replace(spec, width=8, warmup=1, steps=1), 1, [16]
        results = []
        for local in options.local:
            contenders: dict[str, common.Measure] = {
                name: partial(measure, spec, case) for name, case in cases(local).items()
            }
            contenders["pair"] = lambda local=local: [pair(spec, local)]
            samples, skipped = common.interleave(contenders, options.repeats)
            samples |= dict(zip((APART, IN_STEP), map(list, zip(*samples.pop("pair"), strict=True)), strict=True))
            title = f"{options.model}, {local} images per worker and step, 1 thread per worker, {data}"
            common.tell(title, head, rows(samples), skipped)
            results.append({"spec": asdict(spec), "local": local, "samples": samples, "skipped": skipped})
            common.save(options.json, results)


if __name__ == "__main__":
    main()
