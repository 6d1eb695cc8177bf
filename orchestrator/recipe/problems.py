"""What is wrong with a recipe, and where: one line per mistake, all of them at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

from orchestrator.files import printable

NEAR = 0.5  # likeness, from 0 to 1, from which a name is offered
MOST_SHOWN = 20  # names in one message
Path: TypeAlias = "tuple[str | int, ...]"
"""Keys and list positions that lead from the top of a recipe to a value."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file with a line and a column, both from 1; or an override, which has neither."""

    file: str
    line: int | None = None
    column: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. Prints as `recipe.yaml:14:7: base.batchh: unknown key, did you mean "batch"?`"""

    file: str
    line: int | None
    column: int | None
    path: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"
        return ": ".join(part for part in (place, self.path, self.message) if part)

    @classmethod
    def at(cls, place: Place, path: Path, message: str) -> Problem:
        return cls(place.file, place.line, place.column, spell(path), message)


class RecipeError(ValueError):
    """A recipe that cannot be used; `problems` holds every mistake found, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(problems, key=lambda p: (p.line or 0, p.column or 0))
        super().__init__("\n".join(str(p) for p in self.problems))


def spell(path: Path) -> str:
    """`strategies[1].ema.decay` for ("strategies", 1, "ema", "decay")."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return short(text.removeprefix("."))


def short(text: str) -> str:
    """`text` on one line that no terminal obeys, at most 80 characters long."""
    clean = printable(text)
    return clean if len(clean) <= 80 else clean[:77] + "..."


def nearest(name: str, names: Sequence[str]) -> str:
    """`did you mean "batch"?` where a right name is near, else the list of right names."""
    near = max(names, key=lambda n: _likeness(name.lower(), n.lower()), default="")
    if near and _likeness(name.lower(), near.lower())[0] >= NEAR:
        return f'did you mean "{near}"?'
    shown = [*names[:MOST_SHOWN], f"... ({len(names)} in all)"] if len(names) > MOST_SHOWN else names
    return f"expected one of {', '.join(shown)}" if names else "expected none here"


def _likeness(given: str, name: str) -> tuple[float, int]:
    """difflib's ratio; among equals, the length of the common beginning: `seed` means `seeds` rather than `speed`."""
    begins = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(given, name, strict=False)))
    return difflib.SequenceMatcher(None, name, given).ratio(), begins
