"""What no single field can tell: checks across the fields of a recipe, its arms and its grid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from orchestrator.recipe import resolve, search_checks
from orchestrator.recipe.choices import Choice
from orchestrator.recipe.deepspeed_schema import mistakes
from orchestrator.recipe.fields import at, model_in
from orchestrator.recipe.messages import Finding, findings
from orchestrator.recipe.problems import Path
from orchestrator.recipe.resolve import Point
from orchestrator.recipe.scaling import optimizer_options, peak
from orchestrator.recipe.schema import Base
from orchestrator.recipe.study_schema import Recipe
from orchestrator.search import space
from strategies import CATALOGUE
from strategies.contract import PlanError

MAX_TRIALS = 10_000


def check(recipe: Recipe) -> list[Finding]:
    """Every mistake that the schema cannot see, each once, at the place in the recipe that brings it in."""
    found = [*_workers(recipe), *_extra(recipe), *_strategies(recipe), *_size(recipe), *_grid_paths(recipe)]
    found += search_checks.check(recipe)
    if not found:
        for point in _settings(recipe):
            found += _point(recipe, point)
    if not found:
        found += _duplicates(recipe)
    return list({(f.path, f.message): f for f in found}.values())


def _settings(recipe: Recipe) -> Iterator[Point]:
    """All that is trained, and the corners of what Optuna may propose."""
    yield from resolve.settings(recipe)
    for point in resolve.points(recipe):
        search = resolve.search_of(recipe, point.arm)
        if search and search.method.name == "optuna":
            yield from (point.at(space.place(search, [end] * len(space.axes(search)))) for end in (0.0, 1.0))


def _workers(recipe: Recipe) -> Iterator[Finding]:
    workers = recipe.cluster.workers
    if workers > 1 and recipe.engine.name == "solo":
        yield Finding(("cluster", "workers"), f"engine solo is one worker, got {workers}: use engine ddp, or 1 worker")
    if workers > 1 and recipe.cluster.launcher == "solo":
        yield Finding(("cluster", "launcher"), f"solo starts one worker, but workers is {workers}: use auto or gang")


def _extra(recipe: Recipe) -> Iterator[Finding]:
    if recipe.engine.deepspeed:
        for path, message in mistakes(recipe.engine.deepspeed.extra):
            yield Finding(("engine", "deepspeed", "extra", *path), message, of_key=True)


def untested(recipe: Recipe) -> Iterator[Finding]:
    """No mistakes, but the user's own risk."""
    if recipe.engine.deepspeed and recipe.engine.deepspeed.extra:
        keys = ", ".join(map(str, recipe.engine.deepspeed.extra))
        yield Finding(("engine", "deepspeed", "extra"), f"warning: goes to DeepSpeed as it is, untested: {keys}")


def _strategies(recipe: Recipe) -> Iterator[Finding]:
    listed: list[tuple[Path, list[Choice]]] = [(("strategies",), recipe.strategies)]
    listed += [(("arms", name, "strategies"), arm.strategies) for name, arm in recipe.arms.items()]
    for path, choices in listed:
        for i, choice in enumerate(choices):
            try:
                CATALOGUE[choice.name](**choice.options.model_dump())
            except PlanError as error:
                yield Finding((*path, i), str(error))


def _size(recipe: Recipe) -> Iterator[Finding]:
    if resolve.size(recipe) > MAX_TRIALS:
        place = "search" if recipe.search else "arms" if any(arm.search for arm in recipe.arms.values()) else "grid"
        yield Finding((place,), f"makes {resolve.size(recipe)} trials, expected at most {MAX_TRIALS}")


def _grid_paths(recipe: Recipe) -> Iterator[Finding]:
    paths = list(resolve.axes(recipe))
    for path in paths:
        for inner in [p for p in paths if p.startswith(f"{path}.")]:
            yield Finding(("grid", inner), f"overlaps with {path}: put the values of both into one of the two")
    for arm in recipe.arms:
        yield from (f for path in paths if (f := _unused_variant(recipe, arm, path, ("grid", path))))
    for place, search, arms in search_checks.searches(recipe):
        for path in space.axes(search):
            lacks = search_checks.lacking if path.startswith("strategies.") else _unused_variant
            yield from (f for a in arms if (f := lacks(recipe, a, path, (*place, "space", path))))


def _unused_variant(recipe: Recipe, arm: str, path: str, place: Path) -> Finding | None:
    """A path that leads through a variant which the arm does not use."""
    data: Any = resolve.arm_data(recipe, arm)
    keys = path.split(".")
    for n, (key, inner) in enumerate(pairwise(keys), start=1):
        data = data.get(key, {})
        kind = model_in(at(Recipe, tuple(keys[:n])))
        if kind and issubclass(kind, Choice) and inner not in data:
            return Finding(place, f"arm {arm} has {'.'.join(keys[:n])} {next(iter(data))}, not {inner}")
    return None


def _point(recipe: Recipe, point: Point) -> Iterator[Finding]:
    """What is wrong with one arm at one point of the grid."""
    merged = {"study": recipe.study, **point.data}
    try:
        base = Recipe.model_validate(merged).base
    except ValidationError as error:
        for f in findings(error.errors(include_url=False), merged, Recipe):
            yield Finding(_origin(recipe, point, f.path), f.message)
    else:
        for fields, message in _base(base):
            paths = [("base", *field.split(".")) for field in fields]
            yield Finding(_origin(recipe, point, *paths), message)


def _base(base: Base) -> Iterator[tuple[list[str], str]]:
    """(fields that clash, how)"""
    if (base.epochs is None) == (base.steps is None):
        got = "neither" if base.epochs is None else "both"
        yield ["epochs", "steps"], f"expected exactly one of base.epochs, base.steps, got {got}"
    sgd = base.optimizer.sgd
    if sgd and sgd.nesterov and sgd.momentum == 0:
        yield ["optimizer.sgd.nesterov", "optimizer.sgd.momentum"], "nesterov needs a momentum above 0"
    if base.epochs is not None and base.rate.warmup >= base.epochs:
        message = f"warm-up of {base.rate.warmup:g} epochs, expected less than the run's {base.epochs:g}"
        yield ["rate.warmup", "epochs"], message
    try:
        peak(base), optimizer_options(base)
    except PlanError as error:
        yield ["rate.scale", "rate.noise_scale"], str(error)


def _origin(recipe: Recipe, point: Point, *paths: Path) -> Path:
    """Where the recipe states one of `paths`: in the grid, else in the arm, else in the base, else nowhere exactly."""
    data = resolve.stated(recipe)
    dotted = [".".join(key for key in path if isinstance(key, str)) for path in paths]
    in_grid: list[Path] = [("grid", axis) for axis in point.values for d in dotted if _overlap(axis, d)]
    in_space: list[Path] = [(*way, "space", axis[1]) for axis in in_grid for way in _ways(point.arm)]
    in_arm: list[Path] = [("arms", point.arm, *path) for path in paths]
    stated = [path for path in [*in_grid, *in_space, *in_arm, *paths] if _holds(data, path)]
    return stated[0] if stated else paths[0][:1]


def _ways(arm: str) -> tuple[Path, Path]:
    """Where a search may be stated."""
    return ("arms", arm, "search"), ("search",)


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _holds(data: Any, path: Path) -> bool:
    for key in path:
        if not isinstance(data, dict) or key not in data:
            return False
        data = data[key]
    return True


def _duplicates(recipe: Recipe) -> Iterator[Finding]:
    """Points that make the same training: what differs between them does not enter the result."""
    seen: dict[str, Point] = {}
    for point in resolve.settings(recipe):
        trial = resolve.trial_at(recipe, point, 0, lambda data: "", "fp32")
        first = seen.setdefault(trial.id, point)
        if first is not point and first.arm != point.arm:
            yield Finding(("arms", point.arm), f"trains the same as arm {first.arm}")
        elif first is not point:
            yield Finding(("grid",), f"two points train the same, {_spelled(first)} and {_spelled(point)}")


def _spelled(point: Point) -> str:
    return ", ".join(f"{path}={json.dumps(value)}" for path, value in point.values.items())
