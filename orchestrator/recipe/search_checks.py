"""What no single field of a search can tell: boxes, what pruning may be used with, whether arms are searched alike."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from orchestrator.recipe import resolve
from orchestrator.recipe.messages import Finding
from orchestrator.recipe.problems import Path
from orchestrator.recipe.search_schema import Search
from orchestrator.recipe.study_schema import Recipe
from orchestrator.search import space
from orchestrator.search.optuna_sampler import installed


def searches(recipe: Recipe) -> Iterator[tuple[Path, Search, list[str]]]:
    """Each search with its place in the recipe and its arms."""
    shared = [name for name, arm in recipe.arms.items() if not arm.search]
    if recipe.search:
        yield ("search",), recipe.search, shared
    for name, arm in recipe.arms.items():
        if arm.search:
            yield ("arms", name, "search"), arm.search, [name]


def check(recipe: Recipe) -> Iterator[Finding]:
    for path, search, arms in searches(recipe):
        yield from _space(path, search)
        yield from _grid(recipe, path, search)
        yield from _prune(recipe, path, search, arms)
        if search.method.name == "optuna" and not installed():
            yield Finding((*path, "method"), "optuna is not installed: pip install 'bigbatch[search]'")
    yield from _unequal(recipe)


def _space(path: Path, search: Search) -> Iterator[Finding]:
    axes = space.axes(search)
    if not axes:
        yield Finding((*path, "space"), "expected at least one path to search")
    for name, axis in axes.items():
        if axis.name != "exponential" and not axis.options[0] < axis.options[1]:
            low, high = axis.options
            yield Finding((*path, "space", name, axis.name), f"expected [low, high], got [{low:g}, {high:g}]")


def lacking(recipe: Recipe, arm: str, path: str, place: Path) -> Finding | None:
    """A path to an option of a strategy that the arm does not have, or has more than once."""
    name = path.split(".")[1]
    found = sum(method == name for method, _ in resolve.methods(recipe, recipe.arms[arm]))
    if found == 1:
        return None
    if found:
        return Finding(place, f"arm {arm} has {name} {found} times, expected once")
    return Finding(place, f"arm {arm} has no {name}: give the arms that have it a search of their own")


def _grid(recipe: Recipe, path: Path, search: Search) -> Iterator[Finding]:
    for name in space.axes(search):
        for axis in resolve.axes(recipe):
            if f"{name}.".startswith(f"{axis}.") or f"{axis}.".startswith(f"{name}."):
                yield Finding(
                    (*path, "space", name), f"overlaps with {axis} of the grid: searched or crossed, not both"
                )


def _prune(recipe: Recipe, path: Path, search: Search, arms: list[str]) -> Iterator[Finding]:
    rule, place = search.prune.name, (*path, "prune")
    if rule == "none":
        return
    if len(resolve.seeds(recipe)) > 1:
        yield Finding(place, f"{rule} compares single trials, expected one seed: seeds: 1, or prune: none")
    if rule == "exact" and not recipe.workload.target:
        yield Finding(place, "exact goes by steps to the target: set workload.target, or prune: none")
    if rule in ("asha", "median"):
        yield from (Finding(place, message) for message in _caveats(recipe, search, arms))


def _caveats(recipe: Recipe, search: Search, arms: list[str]) -> Iterator[str]:
    """Early ranks are compared only where they can tell something of the final ones."""
    rule, options = search.prune.name, search.prune.options
    if "base.epochs" in space.axes(search):
        yield f"{rule} compares trials of one length, but base.epochs is searched: use exact or none"
    bases = [point.data["base"] for point in resolve.points(recipe) if point.arm in arms]
    if not options.accept_bias and any(_decays(base["rate"]) for base in bases):
        yield (
            f"{rule} ranks trials before their rates have decayed, which misleads: use exact, rate.decay none, or state "
            "accept_bias: true"
        )
    high = space.axes(search).get("base.rate.warmup")
    warmup = max([base["rate"]["warmup"] for base in bases] if not high else [space.value(high, 1.0)], default=0)
    if options.grace < warmup:
        yield f"{rule} may not judge during the warm-up: expected grace >= {warmup:g} epochs, got {options.grace:g}"


def _decays(rate: dict[str, Any]) -> bool:
    return "none" not in rate["decay"]


def _unequal(recipe: Recipe) -> Iterator[Finding]:
    """An arm that is searched more, or in another box, may win for that alone."""
    own = {name: resolve.search_of(recipe, name) for name in recipe.arms}
    if not any(own.values()) or any(search and search.allow_unequal for search in own.values()):
        return
    told: dict[str, Finding] = {}  # by the second arm of a pair, one each
    for (first, one), (second, other) in combinations(own.items(), 2):
        if problem := _difference(one, other):
            path = ("arms", second, "search") if recipe.arms[second].search else ("arms", second)
            finding = Finding(path, f"{problem} than arm {first}: search them alike, or state allow_unequal: true")
            told.setdefault(second, finding)
    yield from told.values()


def _difference(one: Search | None, other: Search | None) -> str | None:
    if one is None or other is None:
        return "is searched otherwise"
    if one.points != other.points:
        return f"has {other.points} points, other"
    boxes, others = space.axes(one), space.axes(other)
    path = next((p for p in boxes.keys() & others.keys() if boxes[p] != others[p]), None)
    return f"has another box for {path}" if path else None
