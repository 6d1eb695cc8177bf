"""results.csv and results.parquet: one row per trial, the same typed columns in both."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from orchestrator.report.load import Result, as_text

INT, FLOAT, TEXT, BOOL = pa.int64(), pa.float64(), pa.string(), pa.bool_()
FIXED: dict[str, pa.DataType] = {  # columns that are fields of a result
    **dict.fromkeys(("trial", "arm"), TEXT),
    **dict.fromkeys(("batch", "seed"), INT),
    **dict.fromkeys(("role", "edge"), TEXT),
    "status": TEXT,
    **{"steps": INT, "epochs": FLOAT, "examples": INT, "flops": FLOAT, "examples_per_second": FLOAT},
    **dict.fromkeys(("workers", "threads", "micro_batch"), INT),
    **dict.fromkeys(("precision", "device"), TEXT),
    **{"parameters": INT, "reused": BOOL, "error": TEXT},
}
TARGET = {
    "metric": TEXT,
    "value": FLOAT,
    "reached": BOOL,
    "step": INT,
    "examples": INT,
    "epochs": FLOAT,
    "flops": FLOAT,
    "seconds": FLOAT,
}
SECONDS = ("startup", "data", "train", "eval")


def table(results: Sequence[Result]) -> pa.Table:
    """Columns in the order of a result.json; a column of `point.<path>` is numeric where all of its values are numbers."""
    columns = {name: _column([getattr(r, name) for r in results], kind) for name, kind in FIXED.items()}
    nested = {
        "status": _points(results),
        "examples": {
            **_metrics(results, "final", lambda r: r.final),
            **_metrics(results, "best", lambda r: r.best),
            **{
                f"target_{k}": _column([getattr(r.target, k, None) for r in results], kind)
                for k, kind in TARGET.items()
            },
            **_metrics(results, "seconds", lambda r: r.seconds, SECONDS),
        },
    }
    ordered: dict[str, pa.Array] = {}
    for name, column in columns.items():
        ordered |= {name: column, **nested.get(name, {})}
    return pa.table(ordered)


def as_csv(rows: pa.Table) -> bytes:
    file = io.BytesIO()
    pyarrow.csv.write_csv(rows, file)
    return file.getvalue()


def as_parquet(rows: pa.Table) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(rows, file)
    return file.getvalue()


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(values, type=kind)


def _metrics(
    results: Sequence[Result], prefix: str, of: Callable[[Result], dict[str, float | None]], always: Sequence[str] = ()
) -> dict[str, pa.Array]:
    names = dict.fromkeys([*always, *sorted({name for r in results for name in of(r)})])
    return {f"{prefix}_{name}": _column([of(r).get(name) for r in results], FLOAT) for name in names}


def _points(results: Sequence[Result]) -> dict[str, pa.Array]:
    paths = dict.fromkeys(path for r in results for path in r.point)
    return {f"point.{path}": _values([r.point.get(path) for r in results]) for path in paths}


def _values(values: list[Any]) -> pa.Array:
    """Grid values: integers, numbers, or else text."""
    kinds = {type(v) for v in values if v is not None}
    if kinds <= {int, float}:
        return _column(values, FLOAT if float in kinds else INT)
    return _column([v if v is None else as_text(v) for v in values], TEXT)
