"""The canonical form of plans and trials, and its hash: what is written the same is the same."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strategies.contract import Plan


def canonical(value: Any) -> Any:
    """`value` as JSON data that tells all of it: dataclasses by class and field, functions by module and name.

    Raises TypeError for what has no stable name (lambdas, closures, arbitrary objects): it can be neither hashed nor printed.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, enum.Enum):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in sorted(value.items(), key=lambda kv: str(kv[0]))}
    if isinstance(value, list | tuple):
        return [canonical(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            "is": _name(type(value)),
            **{f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    if isinstance(value, functools.partial):
        return {"is": _name(value.func), "args": canonical(value.args), "keywords": canonical(value.keywords)}
    if callable(value) and hasattr(value, "__qualname__") and "<" not in value.__qualname__:
        return _name(value)
    raise TypeError(f"{value!r} has no stable name: use a frozen dataclass or a module-level function")


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def phase_key(plan: Plan, index: int, context: dict[str, Any]) -> str:
    """The name of phase `index`: a hash of the plan up to and with it, and of what else determines its result."""
    return digest({"phases": canonical(plan.phases[: index + 1]), "context": context})


def feature_maker(plan: Plan, index: int) -> int:
    """The phase that trained the last of the stages whose output phase `index` reads."""
    kept = [phase.cache.stages if phase.cache else 0 for phase in plan.phases[: index + 1]]
    return max(i for i in range(index) if kept[i] < kept[index])


def feature_key(plan: Plan, index: int, context: dict[str, Any]) -> str:
    """The name of the features that phase `index` reads: one for all phases with the same frozen stages before them."""
    cache = plan.phases[index].cache
    assert cache
    return f"{phase_key(plan, feature_maker(plan, index), context)}.{cache.store}"


def names(plan: Plan, context: dict[str, Any]) -> list[str]:
    """Of all phases and features of the plan."""
    phases = range(len(plan.phases))
    cached = [feature_key(plan, i, context) for i in phases if plan.phases[i].cache]
    return [*(phase_key(plan, i, context) for i in phases), *cached]


def digest(value: Any) -> str:
    """64 hexadecimal digits of the canonical form; key order and the spelling of numbers do not matter."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
