"""Time and FLOPs to equal accuracy, arm against arm: `python -m benchmarks.kernel_rescaling runs/kernel_rescaling`.

Reads a finished study and trains nothing. Each arm stands at its best setting. Differences and ratios are taken seed by
seed; their intervals are Student's t, of logarithms for ratios. The bar of equal accuracy is the mean final accuracy of
the first arm less the tolerance; a trial's cost is that up to its first evaluation at the bar.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeAlias

from benchmarks import common
from orchestrator.comparison.paired import Difference, difference
from orchestrator.report.load import load
from orchestrator.report.summary import summarise

RECIPE = common.REPOSITORY / "recipes" / "kernel_rescaling.yaml"
QUICK = ("workload.data=digits", "workload.model.small_cnn.width=4", "base.epochs=1", "cluster.launcher=solo", "seeds=2",
         "arms.full_size_short.base.epochs=0.6")  # fmt: skip
Cost: TypeAlias = "tuple[float, float]"
"""At least, at most: they differ where a trial never came to the bar."""


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    accuracy: float  # per cent
    flops: float
    seconds: float


Runs: TypeAlias = "dict[int, list[Point]]"
"""Evaluations by seed."""
Costs: TypeAlias = "Callable[[list[Point]], Cost]"


def arms(path: Path) -> dict[str, Runs]:
    """Raises ValueError if the study has nothing to compare."""
    summary = summarise(load(path, None))
    best = {arm: cells[-1].trials for arm, cells in summary.cells.items() if cells}
    found = {arm: {t.seed: points(summary.study.rows(t)) for t in trials} for arm, trials in best.items()}
    if len(found) < 2 or not all(run for runs in found.values() for run in runs.values()):
        raise ValueError(f"{path}: expected finished trials of several arms, with test accuracies and FLOPs")
    return found


def points(rows: Sequence[dict[str, float]]) -> list[Point]:
    told = (row for row in rows if row.get("test_accuracy") is not None and "flops" in row)
    return [Point(100 * row["test_accuracy"], row["flops"], row["seconds"]) for row in told]


def to_bar(bar: float, kind: str) -> Costs:
    """What it took to come to the bar; a trial that did not would have taken more than it did."""

    def cost(run: list[Point]) -> Cost:
        hit = next((getattr(point, kind) for point in run if point.accuracy >= bar), None)
        return (hit, hit) if hit is not None else (getattr(run[-1], kind), math.inf)

    return cost


def at_end(kind: str) -> Costs:
    return lambda run: (getattr(run[-1], kind), getattr(run[-1], kind))


def ratio(one: Runs, other: Runs, cost: Costs) -> str:
    """Of `one` over `other`, by seed: geometric mean and interval."""
    pairs = [(cost(one[seed]), cost(other[seed])) for seed in sorted(one.keys() & other.keys())]
    low = [_log(a[0], b[1]) for a, b in pairs]
    high = [_log(a[1], b[0]) for a, b in pairs]
    found = difference(low, high)
    if found.least != found.most:
        return f"{_exp(found.least)} to {_exp(found.most)}"
    known = (
        f" [{_exp(found.low)}, {_exp(found.high)}]" if math.isfinite(found.low) else ""
    )  # FLOPs are the same each time
    return _exp(found.least) + known


def _log(a: float, b: float) -> float:
    return math.log(a / b) if a < math.inf and b < math.inf else math.copysign(math.inf, a - b if a != b else 1.0)


def _exp(value: float) -> str:
    return "more" if value == math.inf else "less" if value == -math.inf else f"{math.exp(value):.3f}"


def gain(one: Runs, other: Runs) -> Difference:
    """In final accuracy, points."""
    each = [one[seed][-1].accuracy - other[seed][-1].accuracy for seed in sorted(one.keys() & other.keys())]
    return difference(each, each)


def scattered(found: Difference) -> bool:
    """Whether there is an interval: not with one seed, nor of FLOPs, which are the same each time."""
    return math.isfinite(found.low)


def interval(found: Difference) -> str:
    return f"{found.least:+.2f}" + (f" [{found.low:+.2f}, {found.high:+.2f}]" if scattered(found) else "")


def each_arm(found: dict[str, Runs], bar: float) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for arm, runs in found.items():
        ends = [run[-1] for run in runs.values()]
        reached = sum(any(point.accuracy >= bar for point in run) for run in runs.values())
        costs = (common.spread([end.flops / 1e12 for end in ends]), common.spread([end.seconds for end in ends]))
        rows.append((arm, common.spread([end.accuracy for end in ends]), *costs, f"{reached} of {len(runs)}"))
    return rows


def each_pair(found: dict[str, Runs], bar: float) -> list[tuple[str, ...]]:
    """Later arms over earlier ones."""
    costs = [at_end("flops"), at_end("seconds"), to_bar(bar, "flops"), to_bar(bar, "seconds")]
    return [
        (f"{b} / {a}", interval(gain(found[b], found[a])), *(ratio(found[b], found[a], cost) for cost in costs))
        for a, b in combinations(found, 2)
    ]


def verdicts(found: dict[str, Runs], within: float) -> list[str]:
    """Of each arm beside the first."""
    (first, whole), *others = found.items()
    told = []
    for arm, runs in others:
        made, time = gain(runs, whole), seconds(runs) / seconds(whole)
        shown = "is shown" if made.low >= -within else "is excluded" if made.high < -within else "is not shown"
        told.append(f"{arm}: to end at most {within:g} points below {first} {shown}; {time:.2f} of its time")
    return told


def seconds(runs: Runs) -> float:
    return statistics.mean(run[-1].seconds for run in runs.values())


def quick() -> Path:
    """A tiny study of the shipped recipe."""
    folder = Path(tempfile.mkdtemp())
    settings = [word for setting in QUICK for word in ("--set", setting)]
    common.run([sys.executable, "-m", "orchestrator", "run", str(RECIPE), "--output", str(folder), *settings], 600)
    return folder / "kernel_rescaling"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", default=Path("runs/kernel_rescaling"))
    parser.add_argument("--within", type=float, default=0.3, metavar="POINTS", help="that count as equal (default 0.3)")
    parser.add_argument("--quick", action="store_true", help="a tiny study of its own: shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables, with the machine and versions")
    options = parser.parse_args()
    with common.scratch():
        try:
            study = quick() if options.quick else options.study
            found = arms(study)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        bar = statistics.mean(run[-1].accuracy for run in next(iter(found.values())).values()) - options.within
        ends, pairs = each_arm(found, bar), each_pair(found, bar)
        head = ["arm", "final accuracy, %", "TFLOP", "seconds", f"came to {bar:.2f} %"]
        common.tell(f"{study}: medians (ranges) over seeds", head, ends, {})
        head = ["arms", "points", "FLOPs", "seconds", "FLOPs to the bar", "seconds to the bar"]
        common.tell("Differences and ratios, means by seed [95 %]", head, pairs, {})
        told = verdicts(found, options.within)
        print("\n" + "\n".join(told))
        common.save(options.json, {"bar": bar, "arms": ends, "pairs": pairs, "verdicts": told})


if __name__ == "__main__":
    main()
