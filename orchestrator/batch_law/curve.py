"""One curve of trials, with its units, as numbers and as a line of text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.batch_law.fit import Locations
from orchestrator.batch_law.intervals import DISTINCT, QUANTITIES, Estimate, Intervals, estimate
from orchestrator.batch_law.law import Point
from orchestrator.files import printable
from orchestrator.report.wording import figures3
from orchestrator.statistics import regime, slopes

EXAMPLES = ("examples", "samples", "sequences", "images")
HEADER = ("curve", "batch sizes", "sizes", "trials", "E_min", "S_min", "B_crit", "rms log residual")


@dataclass(frozen=True)
class Curve:
    """Points in steps, or in units of examples per example of the batch, from which steps follow if the unit is known."""

    name: str
    points: Sequence[Point]
    unit: str = "examples"  # of E_min

    @property
    def examples_per_unit(self) -> float | None:
        """1 for examples, the number for `epochs (1,281,167 images each)`; None for units that do not say."""
        if self.unit.split(" ")[0] in EXAMPLES:
            return 1.0
        number = re.search(r"\(([\d,.]*\d)\s+\S+\s+each\)", self.unit)
        return float(number[1].replace(",", "")) if number else None


def as_data(curve: Curve) -> dict[str, Any]:
    """What is known of a curve: values with 95 % intervals (null: open, or not known), and B_crit as a value or a bound."""
    found = estimate(curve.points)
    head = {"curve": curve.name, "unit": curve.unit.partition(" (")[0], "trials": len(curve.points)}
    head["misses"] = sum(not p.hit for p in curve.points)
    if found is None:
        few = f"the target was reached at fewer than {DISTINCT} batch sizes"
        return {**head, "batch_sizes": sorted({p.batch for p in curve.points}), "identified": False, "reasons": [few]}
    rest = {
        "batch_sizes": found.at.batches.tolist(),
        "identified": found.identified,
        "reasons": found.reasons,
        "bound": found.bound and {found.bound[0].replace(" ", "_"): found.bound[1]},
        **_quantities(curve, found),
        "rms_log_residual": found.fit.rms,
        "intervals": {name: _scaled(curve, method) for name, method in found.methods.items()},
        "regimes": regimes(found.at),
    }
    return head | rest


def _quantities(curve: Curve, found: Estimate) -> dict[str, dict[str, float | None]]:
    intervals = _scaled(curve, found.quoted)
    values = {q: getattr(found.fit.law, q) * _scale(curve, q) for q in QUANTITIES}
    known = {q: found.quoted[q].bounded and (q != "critical" or found.identified) for q in QUANTITIES}
    return {q: {"value": _number(values[q]) if known[q] else None, **intervals[q]} for q in QUANTITIES}


def _scaled(curve: Curve, intervals: Intervals) -> dict[str, dict[str, float | None]]:
    scales = {q: _scale(curve, q) for q in QUANTITIES}
    return {
        q: {"low": _number(i.low * scales[q]) or None, "high": _number(i.high * scales[q])}
        for q, i in intervals.items()
    }


def _scale(curve: Curve, quantity: str) -> float:
    """Steps of a curve in examples are E / B, so they need to know what an example is; NaN if they do not."""
    return (curve.examples_per_unit or math.nan) if quantity == "steps_min" else 1.0


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def regimes(at: Locations) -> list[dict[str, Any]]:
    """Between neighbouring batch sizes that reached the target: the local slope and the name of the stretch."""
    reached = np.isfinite(at.upper)
    middle = np.where(np.isfinite(at.lower), (at.lower + at.upper) / 2, at.upper)[reached]
    batches = at.batches[reached].tolist()
    pairs = zip(batches, batches[1:], slopes(batches, np.exp(middle).tolist()), strict=False)
    return [{"from": a, "to": b, "slope": slope, "regime": regime(slope)} for a, b, slope in pairs]


def as_text(data: Sequence[dict[str, Any]]) -> str:
    """A table with a row per curve, intervals in brackets; below it, why a critical batch size is not identified."""
    rows = [HEADER, *(_row(one) for one in data)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        f"{printable(d['curve'])}: B_crit is not identified: {'; '.join(d['reasons'])}" for d in data if d["reasons"]
    ]
    return "\n".join([*lines, "brackets: 95 % intervals, the widest of profile likelihood and bootstraps"])


def _row(data: dict[str, Any]) -> tuple[str, ...]:
    sizes = data["batch_sizes"]
    span = f"{sizes[0]:g}-{sizes[-1]:g}" if sizes else "-"
    missed = f" ({data['misses']} missed)" if data["misses"] else ""
    left = (printable(data["curve"]), span, str(len(sizes)), f"{data['trials']}{missed}")
    if "critical" not in data:
        return *left, "-", "-", "-", "-"
    examples, steps = _cell(data["examples_min"], f" {printable(data['unit'])}"), _cell(data["steps_min"])
    return *left, examples, steps, _critical(data), f"{data['rms_log_residual']:.3f}"


def _cell(quantity: dict[str, float | None], unit: str = "") -> str:
    if quantity["value"] is not None:
        return f"{figures3(quantity['value'])}{unit} {_brackets(quantity)}"
    return "-" if quantity["low"] is None and quantity["high"] is None else _brackets(quantity) + unit


def _brackets(quantity: dict[str, float | None]) -> str:
    low, high = (None if quantity[end] is None else figures3(quantity[end] or 0.0) for end in ("low", "high"))
    return f"[{low or '..'}, {high or '..'}]"


def _critical(data: dict[str, Any]) -> str:
    if data["identified"]:
        return _cell(data["critical"])
    word, value = next(iter((data["bound"] or {"unknown": None}).items()))
    return word.replace("_", " ") + (f" {figures3(value)}" if value else "")
