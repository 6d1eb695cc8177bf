"""From the unit cube to the values of a recipe, and back: how each axis of a search is scaled, and where its edges are."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import NormalDist

from orchestrator.recipe.search_schema import Axis, Search
from orchestrator.search.designs import design

EDGE = 0.05  # of a box's side, as the axis is scaled: a best point this close to an end may have a better one beyond it
FIGURES = 4  # significant ones of a value: enough for any search, and the same on every machine
NORMAL = NormalDist()


def axes(search: Search) -> dict[str, Axis]:
    """By dotted path, sorted: the order in which a recipe lists them moves no point."""
    stated = {
        field.alias or name: getattr(search.space, name) for name, field in type(search.space).model_fields.items()
    }
    return {path: axis for path, axis in sorted(stated.items()) if axis is not None}


def place(search: Search, unit: Sequence[float]) -> dict[str, float]:
    """The values at a point of the unit cube."""
    return {path: value(axis, u) for (path, axis), u in zip(axes(search).items(), unit, strict=True)}


def unit(search: Search, values: dict[str, float]) -> tuple[float, ...]:
    """The point of the unit cube at which `values` lie, up to their rounding."""
    return tuple(position(axis, values[path]) for path, axis in axes(search).items())


def value(axis: Axis, u: float) -> float:
    """At `u` in [0, 1] of the axis; within its box whatever the rounding."""
    if axis.name == "exponential":
        return _rounded(axis.options * 10 ** NORMAL.inv_cdf(min(max(u, 1e-9), 1 - 1e-9)))
    low, high = axis.options
    if axis.name == "uniform":
        found = _rounded(low + u * (high - low))
    elif axis.name == "log_uniform":
        found = _rounded(low * (high / low) ** u)
    else:
        found = round(1 - _rounded((1 - low) * ((1 - high) / (1 - low)) ** u), 12)
    return min(max(found, low), high)


def position(axis: Axis, value: float) -> float:
    """The inverse of `value`."""
    if axis.name == "exponential":
        return NORMAL.cdf(math.log10(value / axis.options))
    low, high = axis.options
    if axis.name == "uniform":
        return (value - low) / (high - low)
    if axis.name == "log_uniform":
        return math.log(value / low) / math.log(high / low)
    return math.log((1 - value) / (1 - low)) / math.log((1 - high) / (1 - low))


def designed(search: Search) -> list[dict[str, float]]:
    """The points that no result decides, the same in every cell."""
    units = design(search.method.name, search.points, len(axes(search)), search.seed)
    return [place(search, unit) for unit in units]


def edges(search: Search, values: dict[str, float]) -> list[str]:
    """A phrase for each axis on which the point lies at the edge of the box or is the outermost of the design, which may be far
    from the edge where points are few: the best may lie beyond."""
    tried = designed(search)
    found = ((path, axis, [point[path] for point in tried]) for path, axis in axes(search).items())
    return [text for path, axis, others in found if (text := _edge(axis, path, values[path], others))]


def _edge(axis: Axis, path: str, value: float, tried: Sequence[float]) -> str | None:
    if axis.name == "exponential" or not (at := _side(position(axis, value), [position(axis, t) for t in tried])):
        return None
    low, high = axis.options
    return f"{path} {value:g} at the {at} edge of [{low:g}, {high:g}]"


def _side(u: float, tried: Sequence[float]) -> str | None:
    """Of a single point, no end is told."""
    low, high = (min(tried), max(tried)) if len(tried) > 1 else (0.0, 1.0)
    if u < EDGE or u <= low:
        return "lower"
    return "upper" if u > 1 - EDGE or u >= high else None


def side(told: str, path: str) -> str | None:
    """At which end of its axis, `lower` or `upper`, phrases of `edges` say that a path lies; None if at neither."""
    found = re.search(rf"(?:^|; ){re.escape(path)} \S+ at the (lower|upper) edge", told)
    return found[1] if found else None


def _rounded(value: float) -> float:
    return float(f"{value:.{FIGURES}g}")
