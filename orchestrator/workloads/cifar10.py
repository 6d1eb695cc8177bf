"""CIFAR-10 in its official binary or python layout."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.workloads.files import DataError, Parsed, expect_size, read, require, under_data

PER_FILE = 10_000
PIXELS = 3 * 32 * 32
SPLITS = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
SOURCE = (
    "unpack cifar-10-binary.tar.gz or cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, "
    "and set BIGBATCH_DATA to the folder around it"
)

Part = tuple[NDArray[np.uint8], NDArray[np.integer]]  # (n, 3072) pixels, (n,) labels


def files() -> list[Path]:
    """The six files of the layout that is there, the test file last; raises DataError if none is complete."""
    binary = [under_data("cifar-10-batches-bin") / f"{name}.bin" for name in SPLITS]
    python = [under_data("cifar-10-batches-py") / name for name in SPLITS]
    for layout in (binary, python):
        if all(path.exists() for path in layout):
            return layout
    expected = python if python[0].parent.exists() and not binary[0].parent.exists() else binary
    require(expected, SOURCE)
    return expected


def parse(paths: list[Path]) -> Parsed:
    parts = [_read_binary(p) if p.suffix == ".bin" else _read_python(p) for p in paths]
    train_x = np.concatenate([x for x, _ in parts[:-1]])
    train_y = np.concatenate([y for _, y in parts[:-1]])
    return Parsed(_images(train_x), train_y, _images(parts[-1][0]), parts[-1][1], classes=10)


def _images(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _read_binary(path: Path) -> Part:
    content = read(path)
    expect_size(path, len(content), PER_FILE * (1 + PIXELS))
    rows = np.frombuffer(content, np.uint8).reshape(PER_FILE, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0]


def _read_python(path: Path) -> Part:
    batch = _unpickle(path)
    try:
        x, y = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: corrupt: expected a dictionary with data and labels") from error
    if x.shape != (PER_FILE, PIXELS) or x.dtype != np.uint8 or y.shape != (PER_FILE,) or y.dtype.kind not in "iu":
        raise DataError(f"{path}: corrupt: expected {PER_FILE} x {PIXELS} bytes and labels, got {x.shape}, {y.shape}")
    return x, y


def _unpickle(path: Path) -> Any:
    content = read(path)
    try:
        return ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # damaged pickles raise nearly anything
        cut = isinstance(error, EOFError) or "truncated" in str(error)
        what = f"truncated: the pickle breaks off after {len(content)} bytes" if cut else f"corrupt pickle: {error}"
        raise DataError(f"{path}: {what}") from error


class ArraysOnly(pickle.Unpickler):
    """Unpickles plain values and NumPy arrays; a pickle that asks for anything else is refused before it can act."""

    ALLOWED = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self.ALLOWED:
            return self.ALLOWED[name]
        raise DataError(f"refused: its pickle asks for {module}.{name}, which no CIFAR-10 file needs")
