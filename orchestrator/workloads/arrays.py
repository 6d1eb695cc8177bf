"""Data sets as NumPy arrays: parsed once per node, then memory-mapped by every worker. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.recipe import workload_schema
from orchestrator.workloads import cache, cifar10, digits, image_folder, mnist, npz, spoken_digits
from orchestrator.workloads.files import DataError, Parsed, home, told

PARSING = 1  # raised when parsing changes what the arrays hold, so that an old cache is not taken for the new
NAMES = ("train_x", "train_y", "test_x", "test_y")


@dataclass(frozen=True)
class Arrays:
    """A data set in memory. Images lie in memory as (n, h, w, c), which is the "channels last" form of (n, c, h, w)."""

    train_x: NDArray  # (n, c, h, w) images or (n, d) flat data; uint8 or float32
    train_y: NDArray[np.int64]  # (n,)
    test_x: NDArray
    test_y: NDArray[np.int64]
    classes: int
    mean: tuple[float, ...]  # of the train set, per channel (axis 1): of x / 255 for uint8, of x for floats
    std: tuple[float, ...]  # likewise; 1 where a channel is constant


@told()
def load(data: workload_schema.Data, parsed: Path | None = None) -> Arrays:
    """The data set that a recipe names. Raises DataError if it is missing, truncated or corrupt.

    `parsed`: the folder of the parsed data set, where that came from another node and its source is not here.

    Parsed once per node into $BIGBATCH_HOME (or ~/.cache/bigbatch); all processes map the same files, copy-on-write.
    """
    if parsed:
        return _open(parsed)
    paths, parse = _source(data)
    return _open(cache.folder(_fingerprint(data, paths), lambda fresh: _write(fresh, parse(paths), paths)))


def parsed_folder(fingerprint: str) -> Path:
    """Where `load` keeps what it has parsed."""
    return home() / fingerprint


@told()
def fingerprint(data: workload_schema.Data) -> str:
    """16 hexadecimal digits that change with the source files' bytes, and with what options make of them."""
    return _fingerprint(data, [] if data.name == "noisy_quadratic" else _source(data)[0])


def _source(data: workload_schema.Data) -> tuple[list[Path], Callable[[list[Path]], Parsed]]:
    options: Any = data.options
    match data.name:
        case "digits":
            return digits.files(), digits.parse
        case "mnist":
            return mnist.files(), partial(_shortened, mnist.parse, options.train)
        case "cifar10":
            return cifar10.files(), partial(_shortened, cifar10.parse, options.train)
        case "spoken_digits":
            return spoken_digits.files(), spoken_digits.parse
        case "npz":
            return npz.files(options.path), npz.parse
        case "image_folder":
            return image_folder.files(options.path), partial(image_folder.parse, size=options.size)
    raise ValueError(f"{data.name} has no arrays")


def _shortened(parse: Callable[[list[Path]], Parsed], count: int | None, paths: list[Path]) -> Parsed:
    """With the first `count` training examples, or with all."""
    parsed = parse(paths)
    if count and count > len(parsed.train_y):
        raise DataError(f"{paths[0].parent}: train: {count} examples asked for, there are {len(parsed.train_y)}")
    return parsed._replace(train_x=parsed.train_x[:count], train_y=parsed.train_y[:count])


def _fingerprint(data: workload_schema.Data, paths: list[Path]) -> str:
    options = data.options.model_dump(exclude={"path"}, exclude_none=True)  # the content counts, not where it lies
    if data.name in ("image_folder", "spoken_digits"):  # too many files to read them all
        content = [f"{'/'.join(p.parts[-3:])} {p.stat().st_size}" for p in paths]
    else:
        content = [f"{p.name} {cache.file_hash(p)}" for p in paths]
    return hashlib.sha256(json.dumps([PARSING, data.name, options, content]).encode()).hexdigest()[:16]


def _write(fresh: Path, parsed: Parsed, paths: list[Path]) -> None:
    if wrong := _wrong(parsed):
        raise DataError(f"{paths[0] if len(paths) == 1 else paths[0].parent}: corrupt: {wrong}")
    for name, array in zip(NAMES, parsed[:4], strict=True):
        dtype = np.int64 if name.endswith("y") else np.uint8 if array.dtype == np.uint8 else np.float32
        np.save(fresh / f"{name}.npy", np.ascontiguousarray(array, dtype))
    mean, std = _statistics(parsed.train_x)
    (fresh / "meta.json").write_text(json.dumps({"classes": parsed.classes, "mean": mean, "std": std}))


def _wrong(parsed: Parsed) -> str | None:
    """What is wrong with a data set whose files could be read, if anything."""
    for split, x, y in (("train", parsed.train_x, parsed.train_y), ("test", parsed.test_x, parsed.test_y)):
        if not len(x) or len(x) != len(y):
            return f"the {split} set has {len(x)} examples and {len(y)} labels"
        if y.min() < 0 or y.max() >= parsed.classes:
            return f"{split} labels go from {y.min()} to {y.max()}, expected 0 to {parsed.classes - 1}"
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            return f"{split}_x has values that are not finite"
    train, test = (f"{x.dtype} of shape {x.shape[1:]}" for x in (parsed.train_x, parsed.test_x))
    return None if train == test else f"training examples are {train}, test examples {test}"


def _statistics(x: NDArray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel (the last axis), in float64, a block of examples at a time."""
    unit = 255.0 if x.dtype == np.uint8 else 1.0
    blocks = [x[i : i + 1024].reshape(-1, x.shape[-1]) for i in range(0, len(x), 1024)]
    count = sum(len(block) for block in blocks)
    mean = sum(block.sum(0, dtype=np.float64) for block in blocks) / count
    std = np.sqrt(sum(np.square(block - mean).sum(0) for block in blocks) / count)
    return (mean / unit).tolist(), np.where(std > 0, std / unit, 1.0).tolist()


def _open(path: Path) -> Arrays:
    try:
        meta = json.loads((path / "meta.json").read_text())
        train_x, train_y, test_x, test_y = (np.load(path / f"{name}.npy", mmap_mode="c") for name in NAMES)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged cache ({error}): remove this folder and run again") from error
    mean, std = tuple(meta["mean"]), tuple(meta["std"])
    return Arrays(_channels_first(train_x), train_y, _channels_first(test_x), test_y, meta["classes"], mean, std)


def _channels_first(x: NDArray) -> NDArray:
    return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x
