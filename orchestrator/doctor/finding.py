"""What a check of `bigbatch doctor` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OK: Literal["ok"] = "ok"
WARN: Literal["warn"] = "warn"  # works, but may not do what was meant
BAD: Literal["bad"] = "bad"  # does not work, or is not safe


@dataclass(frozen=True)
class Finding:
    name: str
    status: Literal["ok", "warn", "bad"]
    message: str
    remedy: str | None = None  # what to do, where something is to be done


def ok(name: str, message: str) -> Finding:
    return Finding(name, OK, message)


def warn(name: str, message: str, remedy: str) -> Finding:
    return Finding(name, WARN, message, remedy)


def bad(name: str, message: str, remedy: str) -> Finding:
    return Finding(name, BAD, message, remedy)
