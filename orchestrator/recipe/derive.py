"""Recipe types that follow from others: patches of models, grids over their fields, options of strategies."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import or_
from types import GenericAlias, NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from orchestrator.recipe.choices import LARGEST, WHOLE, Choice, Model
from orchestrator.recipe.fields import branches, fields, model_in
from strategies.contract import Strategy


def patch_of(kind: type[Model]) -> type[Model]:
    """`kind` with every field optional at every depth, else as strict. Null would state nothing, so it is refused."""
    patched: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        inner = model_in(field.annotation)
        annotation = patch_of(inner) if inner else without_none(field)
        patched[name] = (annotation, Field(None, alias=field.alias, description=field.description))
    return create_model(f"{kind.__name__}Patch", __base__=kind, __doc__=kind.__doc__, **patched)


def without_none(field: FieldInfo) -> Any:
    """The field's annotation with its limits, and without null."""
    members = get_args(field.annotation)
    if NoneType in members:
        return reduce(or_, [member for member in members if member is not NoneType])
    return field.rebuild_annotation()


def grid_over(**roots: Any) -> type[Model]:
    """A model whose keys are the dotted paths of all fields under `roots`, each with a list of values."""
    columns: dict[str, Any] = {}
    for path, annotation, description in (row for root, kind in roots.items() for row in places(root, kind)):
        values: Any = GenericAlias(list, (annotation,))
        about = Field(default=None, alias=path, description=description, min_length=1)
        columns[path.replace(".", "__")] = (values, about)
    return create_model("Grid", __base__=Model, __doc__="Values to cross, by the dotted path of a field.", **columns)


def space_over(axis: type[Model], **roots: Any) -> type[Model]:
    """A model whose keys are the dotted paths of all real numbers under `roots`, each with how it is searched."""
    columns: dict[str, Any] = {}
    for path, annotation, description in (row for root, kind in roots.items() for row in places(root, kind)):
        if branches(annotation) == [float]:
            about = Field(default=None, alias=path, description=description)
            columns[path.replace(".", "__")] = (axis | None, about)
    return create_model("Space", __base__=Model, __doc__="What is searched, by the dotted path of a number.", **columns)


def places(path: str, annotation: Any, description: str | None = None) -> Iterator[tuple[str, Any, str | None]]:
    """(dotted path, annotation, description) of a field and of all fields below, without models at the root."""
    kind = model_in(annotation)
    if "." in path or not kind:
        yield path, annotation, description
    for key, field in fields(kind).items() if kind else ():
        yield from places(f"{path}.{key}", model_in(field.annotation) or without_none(field), field.description)


def choice_of(catalogue: Mapping[str, type[Strategy]]) -> type[Choice]:
    """The choice between strategies: one variant for each, with the options of its dataclass."""
    variants: dict[str, Any] = {
        name: (options_of(strategy) | None, Field(None, description=_purpose(strategy)))
        for name, strategy in catalogue.items()
    }
    return create_model("StrategyChoice", __base__=Choice, __doc__="One training method.", **variants)


def options_of(strategy: type[Strategy]) -> type[Model]:
    hints = get_type_hints(strategy)
    options: dict[str, Any] = {}
    for f in dataclasses.fields(strategy):
        limited = _limited(hints[f.name], f.metadata.get("limits", {}))
        default = ... if f.default is dataclasses.MISSING else f.default
        default = list(default) if isinstance(default, tuple) else default  # as a recipe would write it
        options[f.name] = (limited, Field(default, description=f.metadata.get("doc")))
    return create_model(f"{strategy.__name__}Options", __base__=Model, __doc__=_purpose(strategy), **options)


def _limited(hint: Any, limits: Mapping[str, Any]) -> Any:
    """`hint` with the limits on each number in it, and whole floats taken for integers."""
    members: list[Any] = [_limited_branch(branch, limits) for branch in branches(hint)]
    return reduce(or_, members + [None] * (NoneType in get_args(hint)))


def _limited_branch(kind: Any, limits: Mapping[str, Any]) -> Any:
    if get_origin(kind) is list:
        return GenericAlias(list, (_limited(get_args(kind)[0], limits),))
    if kind not in (int, float):
        return kind
    if kind is int:
        return Annotated[int, Field(**{"le": LARGEST, **limits}), WHOLE]
    return Annotated[float, Field(**limits)] if limits else float


def _purpose(strategy: type[Strategy]) -> str:
    """The first line of the strategy's module, where it says what it is for."""
    return (sys.modules[strategy.__module__].__doc__ or strategy.__name__).strip().splitlines()[0]
