"""Finding the way through the recipe's types: from an annotation and a key to the annotation below."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from orchestrator.recipe.choices import Model
from orchestrator.recipe.problems import Path


def branches(annotation: Any) -> list[Any]:
    """The members of a union, without None and with Annotated stripped; a plain type is its own only branch."""
    if get_origin(annotation) is Annotated:
        return branches(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [branch for member in get_args(annotation) for branch in branches(member)]
    return [] if annotation is NoneType else [annotation]


def model_in(annotation: Any) -> type[Model] | None:
    """The model that a map at this place is read as."""
    return next((b for b in branches(annotation) if isinstance(b, type) and issubclass(b, Model)), None)


def fields(kind: type[Model]) -> dict[str, FieldInfo]:
    """Fields by the key that a recipe uses."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def below(annotation: Any, key: str | int) -> Any:
    """The annotation of what stands under `key`, or None if nothing can."""
    kind = model_in(annotation)
    if kind:
        return fields(kind)[key].rebuild_annotation() if key in fields(kind) else None
    for branch in branches(annotation):
        if isinstance(key, int) and get_origin(branch) is list:
            return get_args(branch)[0]
        if isinstance(key, str) and get_origin(branch) is dict:
            return get_args(branch)[1]
    return None


def at(annotation: Any, path: Path) -> Any:
    """The annotation at `path`, or None if a recipe has no such place."""
    for key in path:
        annotation = below(annotation, key)
    return annotation
