"""Folders of images: train/CLASS/*.jpg|png and test/CLASS/*, decoded once into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.workloads.files import DataError, Parsed, require, under_data

SUFFIXES = {".jpg", ".jpeg", ".png"}


def files(path: str) -> list[Path]:
    """Every image under train and test, in the order of their paths."""
    splits = [under_data(path) / split for split in ("train", "test")]
    require(splits, "expected train/CLASS/*.jpg|png and test/CLASS/*.jpg|png; paths start at $BIGBATCH_DATA")
    found: list[Path] = []
    for split in splits:
        images = sorted(p for p in _walk(split) if p.suffix.lower() in SUFFIXES)
        if not images:
            raise DataError(f"{split}: no images, expected CLASS/*.jpg|png in it")
        found += images
    return found


def _walk(split: Path) -> Iterator[Path]:
    for entry in os.scandir(split):
        if entry.is_dir():
            yield from (Path(image.path) for image in os.scandir(entry.path))


def parse(paths: list[Path], size: int) -> Parsed:
    """RGB images of `size` x `size` pixels; classes are the folders of train, in alphabetical order."""
    root = paths[0].parents[2]
    train = [p for p in paths if p.parents[1] == root / "train"]
    test = paths[len(train) :]
    names = sorted({p.parent.name for p in train})
    if strangers := sorted({p.parent.name for p in test} - set(names)):
        raise DataError(f"{root}/test: classes {', '.join(strangers)} are not in {root}/train")
    number = {name: i for i, name in enumerate(names)}
    labels = [np.array([number[p.parent.name] for p in split]) for split in (train, test)]
    return Parsed(_decode(train, size), labels[0], _decode(test, size), labels[1], len(names))


def _decode(paths: list[Path], size: int) -> NDArray[np.uint8]:
    out = np.empty((len(paths), size, size, 3), np.uint8)

    def fill(i: int) -> None:
        out[i] = _pixels(paths[i], size)

    with ThreadPoolExecutor() as threads:  # decoding releases the interpreter's lock
        list(threads.map(fill, range(len(paths))))
    return out


def _pixels(path: Path, size: int) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: corrupt: not an image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        kind = "truncated" if "truncated" in str(error) else "corrupt"
        raise DataError(f"{path}: {kind}: {error}") from error
    return np.asarray(rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BILINEAR))
