"""`--set base.epochs=2`: one value of a recipe's data changed before the recipe is checked."""

from __future__ import annotations

import re
from typing import Any

from orchestrator.recipe.choices import Choice
from orchestrator.recipe.fields import at, model_in
from orchestrator.recipe.problems import Path, Place, Problem, short
from orchestrator.recipe.yaml_nodes import Document, read


def apply(document: Document, override: str, root: Any) -> None:
    """Set `dotted.path=YAML value` in the document; what is wrong with the override joins the document's problems."""
    place = Place(f"--set {short(override)}")
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        document.problems.append(Problem.at(place, (), "expected path=value, such as base.epochs=2"))
        return
    value = read(f"value: {text}" if text.strip() else "value:", place.file)
    if value.problems or set(value.data) != {"value"}:
        message = value.problems[0].message if value.problems else "expected one value"
        document.problems.append(Problem.at(place, (), message))
        return
    try:
        path = _set(document.data, dotted.strip(), value.data["value"], root)
    except _NoSuchPlace as error:
        document.problems.append(Problem.at(place, error.path, error.message))
        return
    _mark(document, path, place)


class _NoSuchPlace(Exception):
    def __init__(self, path: Path, message: str) -> None:
        self.path, self.message = path, message


def _set(data: Any, dotted: str, value: Any, root: Any) -> Path:
    """Put `value` where the dotted path leads, making maps on the way; returns the path."""
    path: Path = ()
    rest = re.sub(r"\[(\d+)\]", r".\1", dotted)
    while True:
        key, rest = _next_key(data, path, rest)
        path = (*path, key)
        if isinstance(data, dict):
            _drop_alternatives(data, key, at(root, path[:-1]))
        if not rest:
            data[key] = value
            return path
        inside = data[key] if isinstance(data, list) else data.get(key)
        data[key] = _container(inside, path, at(root, path))
        data = data[key]


def _next_key(data: Any, path: Path, rest: str) -> tuple[Any, str]:
    """The first key of a dotted path and what follows it. Names of arms, and keys of the grid and of a search's space, hold
    dots themselves."""
    if isinstance(data, list):
        key, _, rest = rest.partition(".")
        if not key.isdigit() or int(key) >= len(data):
            raise _NoSuchPlace(path, f"no item {short(key)}, the list has {len(data)}")
        return int(key), rest
    if path == ("grid",) or path[-2:] == ("search", "space"):
        return rest, ""
    known = [key for key in data if rest == key or rest.startswith(f"{key}.")]
    key = max(known, key=len) if known else rest.partition(".")[0]
    return key, rest[len(key) + 1 :]


def _container(data: Any, path: Path, annotation: Any) -> Any:
    if data is None:
        return {}
    kind = model_in(annotation)
    if isinstance(data, str) and kind and issubclass(kind, Choice):
        return {data: {}}  # the bare name of a variant, written out
    if not isinstance(data, dict | list):
        raise _NoSuchPlace(path, "holds a plain value, there is nothing inside to set")
    return data


def _drop_alternatives(data: dict[str, Any], key: str, annotation: Any) -> None:
    """Setting steps takes epochs away, and one variant another."""
    kind = model_in(annotation)
    others = kind.alternatives() if kind else []
    for other in others if key in others else []:
        if other != key:
            data.pop(other, None)


def _mark(document: Document, path: Path, place: Place) -> None:
    """What the override wrote, and what it had to make on the way, was written there."""
    for places in (document.keys, document.values):
        for old in [p for p in places if p[: len(path)] == path]:
            del places[old]
    for n in range(1, len(path) + 1):
        document.keys.setdefault(path[:n], place)
        document.values.setdefault(path[:n], place)
