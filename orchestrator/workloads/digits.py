"""The 8x8 digits that scikit-learn carries, read without importing it (which takes a second)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from orchestrator.workloads.files import DataError, Parsed, read, require

INKS = 16  # pixels are 0 .. 16


def files() -> list[Path]:
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError("the digits are part of scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    require([path], "reinstall scikit-learn")
    return [path]


def parse(paths: list[Path]) -> Parsed:
    """1,437 training and 360 test images: every fifth example of the list sorted by class is for testing."""
    try:
        rows = np.loadtxt(read(paths[0]).decode().splitlines(), delimiter=",", dtype=np.int64)
    except ValueError as error:
        raise DataError(f"{paths[0]}: corrupt: {error}") from error
    x = np.rint(rows[:, :-1] * (255 / INKS)).astype(np.uint8).reshape(-1, 8, 8, 1)
    y = rows[:, -1]  # a row is 64 pixels and the label
    by_class = np.argsort(y, kind="stable")
    test = by_class[::5]
    train = np.setdiff1d(by_class, test)
    return Parsed(x[train], y[train], x[test], y[test], classes=10)
