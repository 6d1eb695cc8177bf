"""What the schema found wrong, in the words of the person who wrote the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic_core import ErrorDetails

from orchestrator.recipe.choices import Choice
from orchestrator.recipe.fields import at, branches, fields, model_in
from orchestrator.recipe.problems import Path, nearest, short
from orchestrator.recipe.yaml_nodes import scalar
from strategies.contract import SIGNS

BOUNDS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a map"}
PATTERNS = {"import": "package.module:function"}
NAME = "a name of letters, digits, '_', '.' and '-', at most 64, the first a letter or digit"
TRUTH = dict.fromkeys(("yes", "on", "y", "true"), "true") | dict.fromkeys(("no", "off", "n", "false"), "false")
MISFITS = ("_type", "_error", "from_float")  # the value was not of this branch of a union at all


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake at a path of the recipe; `of_key` where the key is wrong and not its value."""

    path: Path
    message: str
    of_key: bool = False
    rank: int = 0  # of the findings at one path, the one of highest rank says most


def findings(errors: Iterable[ErrorDetails], data: Any, root: Any) -> list[Finding]:
    """One finding per mistake: of the branches of a union, which all report, only that which came furthest is told."""
    best: dict[Path, Finding] = {}
    for error in errors:
        finding = _finding(error, data, root)
        if finding.path not in best or best[finding.path].rank < finding.rank:
            best[finding.path] = finding
    prefixes = {path[:n] for path in best for n in range(len(path))}
    return [finding for path, finding in best.items() if path not in prefixes]


def _finding(error: ErrorDetails, data: Any, root: Any) -> Finding:
    path = tuple(_steps(error["loc"], data, root))
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        names = list(fields(model)) if (model := model_in(at(root, path[:-1]))) else []
        return Finding(path, f"unknown key, {nearest(str(path[-1]), names)}", of_key=True)
    if kind == "missing":
        return Finding(path, f"required key is missing, expected {expected(at(root, path))}")
    if error["loc"] and error["loc"][-1] == "[key]":
        return Finding(path, f"expected {NAME}", of_key=True)
    if kind in BOUNDS:
        name = BOUNDS[kind]
        return Finding(path, f"expected {SIGNS[name]} {number(error['ctx'][name])}, got {number(value)}", rank=1)
    return Finding(path, _wrong_value(error, path, at(root, path)), rank=int(not kind.endswith(MISFITS)))


def _steps(location: tuple[int | str, ...], data: Any, root: Any) -> Iterator[str | int]:
    """The keys of a location, without the marks of unions that the schema puts between them."""
    annotation = root
    for part in location:
        below = at(annotation, (part,))
        if part in (data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()):
            data = data[part]
        elif below is None:
            continue
        yield part
        annotation = below


def _wrong_value(error: ErrorDetails, path: Path, annotation: Any) -> str:
    value = error["input"]
    kind = error["type"]
    if kind == "one_of":
        return f"{error['msg']}, got {_keys(value)}"
    if kind == "distinct":
        return error["msg"]
    if kind in ("too_short", "too_long"):
        limits, word = error["ctx"], "least" if kind == "too_short" else "most"
        limit = limits["min_length" if kind == "too_short" else "max_length"]
        return f"expected at {word} {entries(limit)}, got {limits['actual_length'] or 'none'}"
    if kind == "needs_options":
        return f"{value} needs options, write {{{value}: ...}}"
    if kind == "string_pattern_mismatch":
        return f"expected {PATTERNS.get(str(path[-1]), NAME)}, got {got(value)}"
    wanted = literals(annotation)
    if isinstance(value, str) and wanted and all(isinstance(w, str) for w in wanted):
        return f"{got(value)} is not known, {nearest(value, wanted)}"
    return f"expected {expected(annotation)}, got {got(value)}{hint(value, annotation)}"


def entries(n: int) -> str:
    return "one entry" if n == 1 else f"{n} entries"


def _keys(value: Any) -> str:
    keys = [short(str(key)) for key in value] if isinstance(value, dict) else []
    return ", ".join(keys) or "none"


def literals(annotation: Any) -> list[Any]:
    """The values to choose from, if the annotation is nothing else."""
    kinds = branches(annotation)
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Choice):
        return kinds[0].model_fields_by_key()
    return [v for k in kinds for v in get_args(k)] if all(get_origin(k) is Literal for k in kinds) else []


def expected(annotation: Any) -> str:
    """`a whole number or auto`"""
    return " or ".join(_expected(branch) for branch in branches(annotation)) or "nothing"


def _expected(branch: Any) -> str:
    if get_origin(branch) is Literal:
        values = [str(v) for v in get_args(branch)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if isinstance(branch, type) and issubclass(branch, Choice):
        return f"one of {', '.join(branch.model_fields_by_key())}"
    return WORDS.get(get_origin(branch) or branch, "a map")


def got(value: Any) -> str:
    """A value as the message shows it: its kind, and what it is where that is short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f'text "{short(value)}"'
    if isinstance(value, int | float):
        return f"number {number(value)}"
    return "a list" if isinstance(value, list) else "a map"


def number(value: float) -> str:
    """As a person writes it: 1 for 1.0, and never rounded."""
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else repr(value)


def hint(value: Any, annotation: Any) -> str:
    """What to write instead, where the slip is a common one."""
    kinds = branches(annotation)
    numeric = {int, float} & set(kinds)
    if isinstance(value, str) and numeric and isinstance(scalar(value.replace("_", "")), int | float):
        return f": write {value.replace('_', '')} without quotes"
    if isinstance(value, str) and bool in kinds and value.lower() in TRUTH:
        return f": write {TRUTH[value.lower()]}"
    if isinstance(value, int | float) and str in kinds:
        return ": put it in quotes"
    return ""
