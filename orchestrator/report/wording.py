"""Numbers and intervals as words, the same in sentences, captions and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from orchestrator.report.load import Target
from orchestrator.statistics import Estimate

SOURCES = "The trials behind each number, by id: evidence.json."


def count(value: float) -> str:
    """Steps, epochs: `310`, `40.5`; `never` for a miss."""
    return "never" if math.isinf(value) else f"{value:.1f}".removesuffix(".0")


def stretch(value: float, unit: str) -> str:
    """`20 epochs`, `1 step`, `0.004 epochs`; `unit` in the plural."""
    return f"{value:.6g} {unit.removesuffix('s') if value == 1 else unit}"


def figures3(value: float) -> str:
    """Three significant figures, without an exponent for ordinary sizes."""
    if math.isinf(value):
        return "never"
    return f"{value:.0f}" if 100 <= abs(value) < 1e7 else f"{value:#.3g}".removesuffix(".")


def figures2(value: float) -> str:
    """Two significant figures, for what is known no better: `210`, `13000`."""
    return f"{float(f'{value:.2g}'):g}"


def factor(value: float) -> str:
    """A ratio: `0.62`, `7.8`, `45`."""
    if math.isinf(value) or value == 0:
        return "infinite" if value else "0"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:.0f}"


def metric_value(metric: str, value: float) -> str:
    if math.isinf(value):
        return "diverged"
    return f"{value:.3f}" if metric.endswith("accuracy") else f"{value:.4g}"


def metric_name(metric: str) -> str:
    return metric.replace("_", " ")


def goal(target: Target) -> str:
    return f"{metric_name(target.metric)} {target.value:g}"


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def batches(sizes: Sequence[int]) -> str:
    """`batch 64`, `batches 64 and 128`."""
    return f"batch{'es' if len(sizes) > 1 else ''} {joined([str(size) for size in sizes])}"


def spread(estimate: Estimate, text: Callable[[float], str] = count) -> str:
    """`range 38-44`, `95 % interval 38 to never`; empty for a single value."""
    if estimate.n == 1:
        return ""
    return f"{estimate.kind} {span(estimate, text)}"


def span(estimate: Estimate, text: Callable[[float], str] = count) -> str:
    low, high = text(estimate.low), text(estimate.high)
    if low == high:
        return low
    return f"{low} to {high}" if math.isinf(estimate.high) or estimate.low < 0 else f"{low}-{high}"


def joined(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
