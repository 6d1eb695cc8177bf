"""Any arrays in one .npz file: train_x, train_y, test_x, test_y."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.workloads.files import DataError, Parsed, require, under_data

NAMES = ("train_x", "train_y", "test_x", "test_y")
SOURCE = "numpy.savez(path, train_x=..., train_y=..., test_x=..., test_y=...) writes it; paths start at $BIGBATCH_DATA"


def files(path: str) -> list[Path]:
    found = under_data(path)
    require([found], SOURCE)
    return [found]


def parse(paths: list[Path]) -> Parsed:
    """x: (n, c, h, w) images or (n, d) flat data, uint8 or floats; y: (n,) integers from 0."""
    train_x, train_y, test_x, test_y = _read(paths[0])
    for name, x in (("train_x", train_x), ("test_x", test_x)):
        if x.dtype != np.uint8 and x.dtype.kind != "f":
            raise DataError(f"{paths[0]}: {name} is {x.dtype}, expected uint8 or floats")
        if x.ndim not in (2, 4):
            raise DataError(f"{paths[0]}: {name} has shape {x.shape}, expected (n, d) or (n, channels, height, width)")
    for name, y in (("train_y", train_y), ("test_y", test_y)):
        if y.dtype.kind not in "iu" or y.ndim != 1:
            raise DataError(f"{paths[0]}: {name} is {y.dtype} of shape {y.shape}, expected (n,) integers")
    classes = int(max(y.max(initial=0) for y in (train_y, test_y))) + 1
    return Parsed(_channels_last(train_x), train_y, _channels_last(test_x), test_y, classes)


def _read(path: Path) -> list[NDArray]:
    try:
        with np.load(path, allow_pickle=False) as content:
            if missing := [name for name in NAMES if name not in content]:
                raise DataError(f"{path}: has no {', '.join(missing)}; it holds {', '.join(content) or 'nothing'}")
            return [content[name] for name in NAMES]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path}: truncated or corrupt .npz file: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:  # pickled objects, damaged headers, a bare .npy file
        raise DataError(f"{path}: corrupt: expected an .npz file of plain arrays: {error}") from error


def _channels_last(x: NDArray) -> NDArray:
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
