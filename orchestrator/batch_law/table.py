"""Reads curves from JSON, CSV or a study directory. What is wrong is one line that names the place."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from orchestrator.batch_law.curve import Curve
from orchestrator.batch_law.law import Point
from orchestrator.files import Damaged, printable, read_json

Count = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bound = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Checked = TypeVar("Checked", bound=BaseModel)


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) or value is None else [value]


class Row(BaseModel):
    """Trials at one batch size. `lower`: the last evaluation before the target; `reached` false: not by `to_target`."""

    batch_size: Count
    to_target: Annotated[list[Count], BeforeValidator(_listed)]
    lower: Annotated[list[Bound] | None, BeforeValidator(_listed)] = None
    reached: Annotated[list[bool] | None, BeforeValidator(_listed)] = None

    @model_validator(mode="after")
    def _alike(self) -> Row:
        for name in ("lower", "reached"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.to_target):
                raise ValueError(f"{name} has {len(values)} values, to_target {len(self.to_target)}")
        if any(low >= high for low, high in zip(self.lower or [], self.to_target, strict=False)):
            raise ValueError("lower must be below to_target")
        return self

    def points(self, steps: bool) -> list[Point]:
        """Examples over the batch size are steps."""
        scale = 1.0 if steps else 1 / self.batch_size
        lower, reached = self.lower or self.to_target, self.reached or [True] * len(self.to_target)
        rows = zip(lower, self.to_target, reached, strict=True)
        bounds = ((low, high) if hit else (high, float("inf")) for low, high, hit in rows)
        return [Point(self.batch_size, low * scale, high * scale) for low, high in bounds]


class Entry(BaseModel):
    points: Annotated[list[Row], Field(min_length=1)]
    quantity: Literal["steps_to_target", "examples_to_target"]
    unit: str = "examples"


def read(path: Path) -> list[Curve]:
    """Curves in the order of the file. Raises Damaged."""
    if path.is_dir():
        from orchestrator.batch_law.study import curves  # results of a study take the report's own reading

        return curves(path)
    if not path.is_file():
        raise Damaged(f"{path}: no such file or study directory")
    return _from_csv(path) if path.suffix.lower() == ".csv" else _from_json(path)


def _from_json(path: Path) -> list[Curve]:
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise Damaged(f"{path}: expected an object of curves, name: {{points, quantity, unit}}")
    return [_curve(name, _checked(Entry, value, f"{path}: {printable(name)}")) for name, value in content.items()]


def _curve(name: str, entry: Entry) -> Curve:
    steps = entry.quantity == "steps_to_target"
    points = [point for row in entry.points for point in row.points(steps)]
    return Curve(name, points, "examples" if steps else entry.unit)


def _checked(model: type[Checked], value: Any, where: str) -> Checked:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).removeprefix(".")
        got = f", got {printable(repr(first['input']))[:40]}" if first["type"] not in ("missing", "value_error") else ""
        raise Damaged(
            f"{where}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}{got}"
        ) from None


# ------------------------------------------------------------------------------------------------------------------- CSV

QUANTITIES = {  # column: (steps, unit)
    "steps_to_target": (True, "examples"),
    "examples_to_target": (False, "examples"),
    "epochs_to_target": (False, "epochs"),
}


def _from_csv(path: Path) -> list[Curve]:
    """A trial per row: batch_size, one of the quantities above and, if wanted, curve, lower, reached. More do no harm."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise Damaged(f"{path}: not UTF-8 text") from None
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    columns = reader.fieldnames or []
    named = [name for name in QUANTITIES if name in columns]
    if "batch_size" not in columns or len(named) != 1:
        got = ", ".join(map(printable, columns)) or "nothing"
        raise Damaged(f"{path}:1: expected the columns batch_size and one of {', '.join(QUANTITIES)}; got {got}")
    steps, unit = QUANTITIES[named[0]]
    curves: dict[str, list[Point]] = {}
    for name, row in _csv_rows(path, reader, named[0]):
        curves.setdefault(name, []).extend(row.points(steps))
    if not curves:
        raise Damaged(f"{path}: no rows below the columns, expected one for each trial")
    return [Curve(name, points, unit) for name, points in curves.items()]


def _csv_rows(path: Path, reader: csv.DictReader[str], quantity: str) -> Iterable[tuple[str, Row]]:
    for cells in reader:
        names = {"batch_size": "batch_size", "to_target": quantity, "lower": "lower", "reached": "reached"}
        given = {field: cells[column] for field, column in names.items() if cells.get(column)}
        yield cells.get("curve") or path.stem, _checked(Row, given, f"{path}:{reader.line_num}")
