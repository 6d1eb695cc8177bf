"""Data files for tests, in the layouts that users have, in a folder of the test's own."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.recipe.workload_schema import Data

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)


def data(value: Any) -> Data:
    return Data.model_validate(value)


def idx(array: NDArray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, packed: bool) -> Path:
    folder = folder / "mnist"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    for split, n in (("train", 50), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            content = idx(array)
            (folder / (name + ".gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def write_npz(folder: Path, **changes: Any) -> Data:
    arrays = {
        "train_x": RNG.integers(0, 256, (12, 2, 4, 6), np.uint8), "train_y": np.arange(12) % 3,
        "test_x": RNG.integers(0, 256, (5, 2, 4, 6), np.uint8), "test_y": np.arange(5) % 3,
    }  # fmt: skip
    kept = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(folder / "own.npz", **kept)
    return data({"npz": {"path": "own.npz"}})
