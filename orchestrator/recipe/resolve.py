"""From a recipe to its trials: arms merged onto the base, grid values onto arms, one trial for each seed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel

from orchestrator import trial as trials  # a module, not its Trial: trial.py imports this package's schema
from orchestrator.recipe.fields import below, model_in
from orchestrator.recipe.schema import Base
from orchestrator.recipe.search_schema import Search
from orchestrator.recipe.study_schema import Arm, Recipe
from orchestrator.recipe.workload_schema import Data, Workload
from orchestrator.recipe.yaml_nodes import scalar
from orchestrator.search import space

Number: TypeAlias = Literal["fp32", "bf16", "fp64"]


def stated(model: BaseModel) -> dict[str, Any]:
    """What a recipe says, as plain data, without the defaults that it leaves unsaid."""
    return model.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)


def merge(kind: Any, old: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """`old` with `patch` in it: maps merge deeply, all else is replaced, and of alternatives the patch's own stay.

    A map in the place of a list of choices, such as strategies, goes by their names into those that are listed.
    """
    model = model_in(kind)
    alternatives = model.alternatives() if model else []
    replaced = alternatives if any(key in alternatives for key in patch) else []
    merged = {key: value for key, value in old.items() if key not in replaced or key in patch}
    for key, value in patch.items():
        inside, inner = merged.get(key), below(kind, key)
        if isinstance(value, dict) and isinstance(inside, dict):
            merged[key] = merge(inner, inside, value)
        elif isinstance(value, dict) and isinstance(inside, list):
            merged[key] = [merge(below(inner, 0), one, {k: v for k, v in value.items() if k in one}) for one in inside]
        else:
            merged[key] = value
    return merged


def nest(point: dict[str, Any]) -> dict[str, Any]:
    """Grid values by dotted path as nested maps."""
    nested: dict[str, Any] = {}
    for path, value in point.items():
        *way, last = path.split(".")
        inside = nested
        for key in way:
            inside = inside.setdefault(key, {})
        inside[last] = value
    return nested


@dataclass(frozen=True, slots=True)
class Point:
    """An arm at one point of the grid, or of a search there, as plain data."""

    arm: str
    values: dict[str, Any]  # by dotted path
    data: dict[str, Any]  # base, workload, precision and strategies, merged

    def at(self, values: dict[str, Any]) -> Point:
        """With these values too."""
        return Point(self.arm, self.values | values, merge(Recipe, self.data, nest(values)))


def axes(recipe: Recipe) -> dict[str, list[Any]]:
    """Grid values by dotted path, as plain data, in the order in which the schema lists the paths."""
    return stated(recipe.grid)


def arm_data(recipe: Recipe, arm: str) -> dict[str, Any]:
    """Base, workload, precision and strategies of an arm, with every default filled in."""
    shared = recipe.model_dump(mode="json", by_alias=True, exclude_none=True, include={"base", "workload", "precision"})
    own = recipe.arms[arm]
    strategies = [{name: options} for name, options in methods(recipe, own)]
    if own.model:
        shared["workload"]["model"] = own.model.model_dump(mode="json", by_alias=True, exclude_none=True)
    return merge(Recipe, shared, {"base": stated(own.base)}) | {"strategies": strategies}


def points(recipe: Recipe) -> Iterator[Point]:
    """All points: arms in the order of the recipe, for each the product of the grid, the last axis running fastest."""
    grid = axes(recipe)
    for name in recipe.arms:
        own = arm_data(recipe, name)
        for values in itertools.product(*grid.values()):
            yield Point(name, {}, own).at(dict(zip(grid, values, strict=True)))


def search_of(recipe: Recipe, arm: str) -> Search | None:
    return recipe.arms[arm].search or recipe.search


def settings(recipe: Recipe) -> Iterator[Point]:
    """All points, and where an arm is searched those of its design: all that is trained, save what results decide."""
    for point in points(recipe):
        search = search_of(recipe, point.arm)
        yield from designed(point, search) if search else [point]


def designed(cell: Point, search: Search) -> list[Point]:
    """The points of a search in a cell, the same at each point of the grid; none if each goes by results."""
    return [cell.at(values) for values in space.designed(search)]


def seeds(recipe: Recipe) -> list[int]:
    return list(range(recipe.seeds)) if isinstance(recipe.seeds, int) else recipe.seeds


def size(recipe: Recipe) -> int:
    """How many trials the recipe makes, winners of its searches included."""
    cells = math.prod(len(values) for values in axes(recipe).values())
    runs = recipe.seeds if isinstance(recipe.seeds, int) else len(recipe.seeds)
    return sum(cells * _runs(search_of(recipe, arm), runs) for arm in recipe.arms)


def _runs(search: Search | None, seeds: int) -> int:
    return search.points * seeds + search.winners if search else seeds


def expand(recipe: Recipe, fingerprint: str | Callable[[Data], str], precision: Number) -> list[trials.Trial]:
    """The trials of a recipe that `load` gave which no result decides: by arm, then by point of the grid, then by point
    of the search if there is one, then by seed.

    `fingerprint` identifies the data set, or tells it from the recipe's words for it. `precision` stands in for `auto`.
    """
    of = functools.cache(fingerprint) if callable(fingerprint) else lambda data: fingerprint
    return [trial_at(recipe, point, seed, of, precision) for point in settings(recipe) for seed in seeds(recipe)]


def trial_at(
    recipe: Recipe, point: Point, seed: int, fingerprint: Callable[[Data], str], precision: Number
) -> trials.Trial:
    workload = Workload.model_validate(point.data["workload"])
    return trials.Trial(
        arm=point.arm,
        seed=seed,
        point=point.values,
        role="tuning" if search_of(recipe, point.arm) else "grid",
        workload=workload,
        base=Base.model_validate(point.data["base"]),
        strategies=tuple(pair for one in point.data["strategies"] for pair in one.items()),
        precision=precision if point.data["precision"] == "auto" else point.data["precision"],
        data=fingerprint(workload.data),
        engine=recipe.engine,
        cluster=recipe.cluster,
        speed=recipe.speed,
        checkpoint=recipe.checkpoint,
        log_steps=recipe.log_steps,
    )


def methods(recipe: Recipe, arm: Arm) -> tuple[tuple[str, dict[str, Any]], ...]:
    """(recipe name, options with every default) of the study's strategies, then of the arm's."""
    choices = [*recipe.strategies, *arm.strategies]
    return tuple((choice.name, choice.options.model_dump(mode="json")) for choice in choices)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON data with every default filled in, each choice as a map with one key."""
    full = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    return full | {"grid": axes(recipe)}


class _Dumper(yaml.SafeDumper):
    """Quotes what the reader would not take for text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, value: str) -> yaml.ScalarNode:
        plain = isinstance(scalar(value), str) and value.isprintable()
        style = None if plain else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _Dumper.text)


def dump(data: Any) -> str:
    """Plain data as YAML that `load` reads back as it was."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
