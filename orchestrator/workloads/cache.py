"""The node's cache of parsed data sets: built once under a lock, moved into place whole, shared by all workers."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.workloads.files import home


def folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `build(empty folder)` fills it, once, if it is not there yet."""
    final = home() / name
    with _locked(final.with_suffix(".lock")):
        if not final.exists():
            fresh = final.with_suffix(".tmp")  # left by a build that was killed, if it is there
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            build(fresh)
            _sync(fresh)
            fresh.rename(final)
    return final


def file_hash(path: Path) -> str:
    """SHA-256 of the content, remembered for as long as (path, size, modification time) stay the same."""
    stat = path.stat()
    known = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    note = home() / "hashes" / known
    if note.exists():
        return note.read_text()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_suffix(f".{os.getpid()}")
    fresh.write_text(digest)
    fresh.replace(note)
    return digest


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # freed by the kernel if its holder dies
        yield


def _sync(fresh: Path) -> None:
    for file in fresh.iterdir():
        with file.open("rb") as content:
            os.fsync(content.fileno())
