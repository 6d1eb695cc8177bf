"""Arms compared with each other on the same seeds, at each batch size that both have."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import Any

from orchestrator.comparison.paired import Difference, difference, holm
from orchestrator.report.load import Result
from orchestrator.report.summary import Cell, Summary, higher_is_better, steps_to_target
from orchestrator.report.tables import Table
from orchestrator.report.wording import SOURCES, joined, metric_name, plural

ALL_PAIRS = 3  # arms up to which each is compared with each; with more, with the first alone
STEPS = "steps to target"
UNKNOWN = "not known"
Range = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """`arm` minus `other`; of steps, the difference of the logarithms."""

    arm: str
    other: str
    batch: int
    quantity: str  # "steps to target", "final test_accuracy", "best test_accuracy"
    trials: tuple[tuple[str, str], ...]  # of arm and other, a pair per seed
    missed: tuple[int, int]  # of each side: without target, or diverged, so that the pair has a range
    found: Difference
    adjusted: float | None = None  # p after Holm, over all comparisons of this quantity


@lru_cache(maxsize=1)
def comparisons(summary: Summary) -> list[Comparison]:
    """By pair of arms, batch size and quantity."""
    found = [c for a, b in _pairs(list(summary.cells)) for c in _compare(summary, summary.cells[b], summary.cells[a])]
    adjusted = {q: iter(holm([c.found.p for c in found if c.quantity == q])) for q in _quantities(summary)}
    return [replace(c, adjusted=next(adjusted[c.quantity])) for c in found]


def _pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    return list(combinations(arms, 2)) if len(arms) <= ALL_PAIRS else [(arms[0], arm) for arm in arms[1:]]


def _compare(summary: Summary, cells: Sequence[Cell], others: Sequence[Cell]) -> Iterator[Comparison]:
    for cell in cells:
        for other in (c for c in others if c.batch == cell.batch):
            seeds = {t.seed: t for t in other.trials}
            shared = [(t, seeds[t.seed]) for t in cell.trials if t.seed in seeds]
            for quantity in _quantities(summary) if shared else ():
                yield _comparison(cell, other, shared, quantity)


def _quantities(summary: Summary) -> list[str]:
    """Metrics say nothing of trials that end where they reach the target."""
    metric = None if summary.stops else summary.metric
    return [STEPS] * bool(summary.target) + ([f"final {metric}", f"best {metric}"] if metric else [])


def _comparison(cell: Cell, other: Cell, shared: Sequence[tuple[Result, Result]], quantity: str) -> Comparison:
    ranges = [_ranges(a, b, quantity) for a, b in shared]
    found = difference([a[0] - b[1] for a, b in ranges], [a[1] - b[0] for a, b in ranges])
    missed = sum(a[0] < a[1] for a, _ in ranges), sum(b[0] < b[1] for _, b in ranges)
    trials = tuple((a.trial, b.trial) for a, b in shared)
    return Comparison(cell.arm, other.arm, cell.batch, quantity, trials, missed, found)


def _ranges(a: Result, b: Result, quantity: str) -> tuple[Range, Range]:
    """What is known of the quantity on both sides: a value twice, or two ends."""
    if quantity == STEPS:
        return _log_steps(a), _log_steps(b)
    kind, _, metric = quantity.partition(" ")
    x, y = _value(a, kind, metric), _value(b, kind, metric)
    return _range(x, y, metric), _range(y, x, metric)


def _log_steps(trial: Result) -> Range:
    """A miss takes more steps than were run."""
    steps = max(steps_to_target(trial), 1.0)
    return math.log(steps if math.isfinite(steps) else max(trial.steps or 1, 1)), math.log(steps)


def _value(trial: Result, kind: str, metric: str) -> float | None:
    if kind == "best":
        return trial.best.get(metric)
    return None if trial.diverged else trial.final.get(metric)


def _range(value: float | None, other: float | None, metric: str) -> Range:
    """A trial that diverged is worse than the one beside it, nobody knows by how much."""
    if value is not None:
        return value, value
    if other is None:
        return -math.inf, math.inf
    return (-math.inf, other) if higher_is_better(metric) else (other, math.inf)


# ------------------------------------------------------------------------------------------------------ table and words


def pairs_table(summary: Summary) -> Table:
    return Table.of([_row(c) for c in comparisons(summary)])


def _row(c: Comparison) -> dict[str, Any]:
    return {
        "comparison": f"{c.arm} - {c.other}",
        "batch": c.batch,
        "quantity": metric_name(c.quantity),
        "mean difference": mean(c),
        "95 % interval": interval(c),
        "pairs": c.found.n,
        "below 0": c.found.below,
        "above 0": c.found.above,
        "p": _p(c.found.p),
        "p after Holm": _p(c.adjusted),
        "test": c.found.test if c.found.p is not None else None,
        "misses": _misses(c) or None,
    }


def _p(value: float | None) -> str | None:
    return None if value is None else f"{value:.2g}" if value >= 0.001 else "< 0.001"


def mean(c: Comparison) -> str:
    """`-20 %`, `at most -20 %`, `not known`."""
    least, most = c.found.least, c.found.most
    if least == most:
        return _amount(c, least)
    if math.isfinite(least) and math.isfinite(most):
        return f"{_amount(c, least)} to {_amount(c, most)}"
    if math.isfinite(most):
        return f"at most {_amount(c, most)}"
    return f"at least {_amount(c, least)}" if math.isfinite(least) else UNKNOWN


def interval(c: Comparison) -> str | None:
    """`[-1.4, -0.2]` in the unit of the mean; an open end is `..`."""
    low, high = (_number(c, end) if math.isfinite(end) else ".." for end in (c.found.low, c.found.high))
    return f"[{low}, {high}]" if (low, high) != ("..", "..") else None


def _amount(c: Comparison, value: float) -> str:
    unit = " %" if c.quantity == STEPS else " points" if c.quantity.endswith("accuracy") else ""
    return f"{_number(c, value)}{unit}"


def _number(c: Comparison, value: float) -> str:
    """With as many decimals as give the largest of mean and ends two significant digits."""
    f = c.found
    largest = max((abs(_scaled(c, v)) for v in (f.least, f.most, f.low, f.high) if math.isfinite(v)), default=0.0)
    decimals = max(1 - math.floor(math.log10(largest)), 0) if largest > 0 else 0
    text = f"{_scaled(c, value):+.{decimals}f}"
    return text if float(text) else text[1:]


def _scaled(c: Comparison, value: float) -> float:
    """Steps as percent more or fewer, accuracies in points of percent."""
    if c.quantity == STEPS:
        return 100 * math.expm1(value)
    return 100 * value if c.quantity.endswith("accuracy") else value


def _misses(c: Comparison) -> str:
    verb = "missed the target" if c.quantity == STEPS else "without a value"
    told = [f"{n} of {arm}" for n, arm in zip(c.missed, (c.arm, c.other), strict=True) if n]
    return f"{joined(told)} {verb}" if told else ""


def sentences(summary: Summary) -> list[str]:
    """A line per pair of arms: at the largest batch size where seeds in common tell of them, or that there are none."""
    pairs = _pairs(list(summary.cells))
    return [line for a, b in pairs for line in _lines(summary, b, a)] if len(pairs) <= ALL_PAIRS else []


def _lines(summary: Summary, arm: str, other: str) -> list[str]:
    own, others = ({c.batch for c in summary.cells[name]} for name in (arm, other))
    found = [c for c in comparisons(summary) if (c.arm, c.other) == (arm, other) and not c.quantity.startswith("best")]
    several = [c for c in found if c.found.n > 1]
    if several:
        return [_sentence(_telling(several))]
    alone = own & others and not found
    return (
        [f"{arm} - {other}: no seed was trained on both sides, so there are no differences by seed."] if alone else []
    )


def _telling(found: Sequence[Comparison]) -> list[Comparison]:
    """At the largest batch size where something is known, of steps if there is a target; if at none, at the largest of all."""
    known = [c.batch for c in found if c.quantity == found[0].quantity and mean(c) != UNKNOWN]
    last = max(known or [c.batch for c in found])
    return [c for c in found if c.batch == last]


def _sentence(found: Sequence[Comparison]) -> str:
    first = found[0]
    parts = [f"{metric_name(c.quantity)} {_told(c)}" for c in found]
    return f"{first.arm} - {first.other} at batch {first.batch}: {'; '.join(parts)}; {plural(first.found.n, 'seed')}."


def _told(c: Comparison) -> str:
    same = c.found.p is None and c.found.least == c.found.most
    if same:
        return f"{mean(c)} in each seed"
    ends, p = interval(c), _p(c.adjusted)
    misses = f" ({_misses(c)})" if any(c.missed) else ""
    return f"{mean(c)}{f' {ends}' if ends else ''}{misses}{f', p {p} after Holm' if p else ''}"


def pairs_note(summary: Summary) -> str:
    """How to read the table."""
    against = "the first" if len(summary.cells) > ALL_PAIRS else "each"
    tests = Counter(metric_name(c.quantity) for c in comparisons(summary) if c.found.p is not None)
    counted = f" ({joined([f'{n} of {quantity}' for quantity, n in tests.items()])})" if tests else ""
    misses = (
        "A trial that missed the target took more steps than it ran: its pair is kept, the mean then has a bound, the "
        "interval is open on that side, and the test is the sign test over pairs whose order is known, if any. "
    )
    stop = "Trials end when they reach the target, so only steps are compared. " if summary.stops else ""
    return (
        f"Differences between arms on the same seed, averaged; each arm is compared with {against}. Steps are compared by "
        "their ratio (geometric mean), accuracies in points. Intervals and p: Student's t over seeds, so seeds that all "
        f"differ alike have none. {misses if summary.target else ''}{stop}p after Holm holds for all tests of a "
        f"quantity together{counted}; an interval is that of its comparison alone. {SOURCES}"
    )
