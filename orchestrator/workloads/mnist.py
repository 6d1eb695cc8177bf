"""MNIST in its four official IDX files, plain or .gz."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.workloads.files import DataError, Parsed, expect_size, read, require, under_data

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SOURCE = (
    "get the four files (.gz or unpacked) from http://yann.lecun.com/exdb/mnist into a folder mnist, "
    "and set BIGBATCH_DATA to the folder around it"
)
UNSIGNED_BYTE = 8


def files() -> list[Path]:
    """The four files in the order of `NAMES`; raises DataError if one is missing."""
    folder = under_data("mnist")
    found = [plain if (plain := folder / name).exists() else folder / f"{name}.gz" for name in NAMES]
    require(found, SOURCE)
    return found


def parse(paths: list[Path]) -> Parsed:
    train_x, train_y, test_x, test_y = (read_idx(path, ndim) for path, ndim in zip(paths, (3, 1, 3, 1), strict=True))
    return Parsed(train_x[..., None], train_y, test_x[..., None], test_y, classes=10)


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes with `ndim` dimensions."""
    content = read(path)
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DataError(f"{path}: truncated: expected {header} bytes and more, got {len(content)}")
    if content[:4] != bytes([0, 0, UNSIGNED_BYTE, ndim]):
        raise DataError(f"{path}: corrupt: not a {ndim}-D IDX file of unsigned bytes (starts with {content[:4].hex()})")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    expect_size(path, len(content), header + math.prod(shape))
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
