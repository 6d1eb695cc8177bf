"""The best learning rate at each batch size, where a study chose among several, and how it grows with the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from pydantic import ValidationError

from orchestrator.recipe.scaling import peak
from orchestrator.recipe.schema import Base
from orchestrator.report.summary import Cell, Summary
from orchestrator.report.wording import joined
from orchestrator.search.space import side

PATH = "base.rate.peak"
FEWEST = 3  # batch sizes inside their box, for an exponent: a line through two says nothing about scatter


@dataclass(frozen=True, slots=True)
class BestRate:
    arm: str
    trials: tuple[str, ...]
    batch: int
    rate: float  # at the peak of its schedule, as the scaling rule makes it at this batch size
    edge: str | None  # "lower" | "upper": where it is the last value that was tried, so that the best may lie beyond


@lru_cache(maxsize=1)
def best_rates(summary: Summary) -> dict[str, list[BestRate]]:
    """By arm, of those whose rate was chosen at two batch sizes or more."""
    return {arm: rates for arm, rates in _chosen(summary).items() if len(rates) > 1}


def _chosen(summary: Summary) -> dict[str, list[BestRate]]:
    return {arm: [r for c in cells if (r := _best(summary, c))] for arm, cells in summary.cells.items()}


def listed(summary: Summary) -> list[BestRate]:
    return [rate for rates in best_rates(summary).values() for rate in rates]


def unsaid(summary: Summary) -> list[str]:
    """Why there is no figure, where a rate was chosen."""
    if best_rates(summary) or not any(_chosen(summary).values()):
        return []
    return ["No figure of the best rates: each arm's rate was chosen at one batch size at most."]


def _best(summary: Summary, cell: Cell) -> BestRate | None:
    """None where the rate was not chosen, or of a trial in another version's words."""
    if cell.settings == 1 or PATH not in cell.setting:
        return None
    try:
        base = Base.model_validate(summary.study.config(cell.trials[0]).get("base"))
    except ValidationError:
        return None
    chosen = base.model_copy(update={"rate": base.rate.model_copy(update={"peak": cell.setting[PATH]})})
    trials = tuple(t.trial for t in cell.trials)
    return BestRate(cell.arm, trials, cell.batch, peak(chosen), _edge(summary, cell))


def _edge(summary: Summary, cell: Cell) -> str | None:
    """A search tells its edges; those of a grid are its least and its largest value."""
    if cell.fresh:
        return side(cell.trials[0].edge or "", PATH)
    here = [r for r in summary.study.results if (r.arm, r.batch) == (cell.arm, cell.batch)]
    tried = {r.point[PATH] for r in here if PATH in r.point}
    ends = {min(tried): "lower", max(tried): "upper"}
    return ends.get(cell.setting[PATH]) if len(tried) > 1 else None


def exponent(rates: Sequence[BestRate]) -> float | None:
    """p of rate = c B^p by least squares of the logarithms, of those inside their box; None for fewer than three."""
    inside = [r for r in rates if not r.edge]
    if len(inside) < FEWEST:
        return None
    return float(np.polyfit(np.log([r.batch for r in inside]), np.log([r.rate for r in inside]), 1)[0])


def caption(summary: Summary) -> tuple[str, str]:
    found = best_rates(summary)
    slopes = [f"{arm} {p:.2f}" for arm, rates in found.items() if (p := exponent(rates)) is not None]
    grown = (
        f" Where it lies inside its box, the best rate grows as B to the power of {joined(slopes)}." if slopes else ""
    )
    edges = sum(bool(r.edge) for r in listed(summary))
    beyond = f" Open triangles: {edges} at the edge of what was tried: the best may lie beyond." if edges else ""
    return "Best learning rate against batch size", (
        "Peak learning rate of the best setting at each batch size, scaling rule included. Dashed: in proportion to the batch "
        f"size; dotted: to its square root; both from the smallest batch size of each arm.{grown}{beyond}"
    )


def guide(rates: Sequence[BestRate], power: float) -> list[float]:
    """The rate of the smallest batch size, times (B / B_0)^power, at each."""
    first = rates[0]
    return [first.rate * math.pow(r.batch / first.batch, power) for r in rates]
