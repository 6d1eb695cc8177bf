"""Finding and reading source files: missing, truncated and corrupt files are told apart."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from numpy.typing import NDArray


class DataError(Exception):
    """A data set that can't be had: one line that says which file, what is wrong with it, and the way out."""


class Parsed(NamedTuple):
    """A data set as its files tell it; `x` uint8 or float, images as (n, h, w, c), flat data as (n, d)."""

    train_x: NDArray
    train_y: NDArray  # (n,) integers
    test_x: NDArray
    test_y: NDArray
    classes: int


@contextmanager
def told() -> Iterator[None]:
    """Failures of the file system (no right to read, disk full) as one clear line."""
    try:
        yield
    except OSError as error:
        where, what = error.filename or home(), error.strerror or error
        raise DataError(f"{where}: {what} (the cache is {home()}; BIGBATCH_HOME moves it)") from error


def home() -> Path:
    """The cache of data sets: $BIGBATCH_HOME/data, or ~/.cache/bigbatch/data."""
    return Path(os.environ.get("BIGBATCH_HOME") or "~/.cache/bigbatch").expanduser().absolute() / "data"


def under_data(path: str) -> Path:
    """`path` in $BIGBATCH_DATA, or in the current folder where that is not set; absolute paths stay as they are."""
    return Path(os.environ.get("BIGBATCH_DATA", ".")).expanduser().absolute() / Path(path).expanduser()


def require(paths: Iterable[Path], source: str) -> None:
    """Raises DataError with every path that is not there; `source` says where to get them."""
    if missing := [str(p) for p in paths if not p.exists()]:
        raise DataError(f"missing {', '.join(missing)}: {source}")


def read(path: Path) -> bytes:
    """The content of `path`, unpacked where its name ends in .gz; a cut .gz gives what is left of it."""
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return zlib.decompressobj(wbits=31).decompress(content)
    except zlib.error as error:
        raise DataError(f"{path}: corrupt gzip file: {error}") from error


def expect_size(path: Path, got: int, expected: int) -> None:
    if got < expected:
        raise DataError(f"{path}: truncated: expected {expected} bytes, got {got}")
    if got > expected:
        raise DataError(f"{path}: corrupt: expected {expected} bytes, got {got}")
