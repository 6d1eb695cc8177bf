"""A forecast as JSON, and as a table with the inputs below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.files import finite, printable
from orchestrator.predict.forecast import Forecast, Range, Row
from orchestrator.predict.inputs import inputs
from orchestrator.report.wording import figures3

BEFORE_COST = ("workers", "batch", "local", "steps", "step", "time to target")
AFTER_COST = ("examples", "workers' use", "speed-up", "")
UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))


def as_data(forecast: Forecast) -> dict[str, Any]:
    """Seconds, device-hours, and the price's currency; efficiencies and speed-up are ratios. Null: not known, or no end."""
    rows, optima = list(forecast.rows), forecast.optima
    data: dict[str, Any] = {
        "arm": forecast.calibration.measured.arm,
        "hardware": forecast.hardware.model_dump(),
        "identified": forecast.steps.estimate.identified,
        "steps_min": forecast.steps.law.steps_min,
        "critical": forecast.steps.law.critical,
        "rows": [_row_data(row, forecast.hardware.price) for row in rows],
        "optima": {name.replace(" ", "_"): rows.index(row) for name, row in optima.items()},
        "inputs": [asdict(one) for one in inputs(forecast)],
    }
    return finite(data)


def _row_data(row: Row, price: float | None) -> dict[str, Any]:
    return {
        "workers": row.load.workers,
        "batch": row.batch,
        "local_batch": row.load.local_batch,
        "accumulation": row.load.passes,
        "steps": asdict(row.steps),
        "step_seconds": asdict(row.step_seconds),
        "seconds": asdict(row.seconds),
        "device_hours": asdict(row.device_hours),
        "cost": None if price is None else asdict(row.device_hours.times(price)),
        "statistical_efficiency": row.statistical,
        "hardware_efficiency": row.hardware,
        "speed_up": row.speed_up,
        "uncalibrated": row.uncalibrated,
    }


def as_text(forecast: Forecast) -> str:
    price, optima = forecast.hardware.price, forecast.optima
    header = (*BEFORE_COST, "device time" if price is None else "cost", *AFTER_COST)
    table = [header, *(_cells(row, price, _marks(optima, row)) for row in forecast.rows)]
    listed = [("input", "from", "value"), *((i.name, i.source, i.value) for i in inputs(forecast))]
    title = f"arm {forecast.calibration.measured.arm} on {forecast.hardware.name}"
    return "\n".join([printable(title), "", *aligned(table), "", *aligned(listed)])


def _marks(optima: dict[str, Row], row: Row) -> str:
    return ", ".join(name for name, best in optima.items() if best is row)


def _cells(row: Row, price: float | None, mark: str) -> tuple[str, ...]:
    accumulated = f" in {row.load.passes}" if row.load.passes > 1 else ""
    return (
        str(row.load.workers),
        str(row.batch),
        f"{row.load.local_batch:g}{accumulated}",
        _range(row.steps, 1),
        _time(row.step_seconds),
        _time(row.seconds),
        _time(row.device_hours.times(3600)) if price is None else _range(row.device_hours.times(price), 1),
        f"{100 * row.statistical:.0f} %",
        "-" if row.hardware is None else f"{100 * row.hardware:.0f} %",
        "-" if row.speed_up is None else f"{row.speed_up:.3g}",
        mark,
    )


def _time(seconds: Range) -> str:
    unit, name = next(((u, n) for u, n in UNITS if seconds.value >= u), UNITS[-1])
    return _range(seconds, 1 / unit, f" {name}")


def _range(values: Range, scale: float, unit: str = "") -> str:
    value, low, high = (figures3(v * scale) for v in (values.value, values.low, values.high))
    return f"{value}{unit} [{low}, {high}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
