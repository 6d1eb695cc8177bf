"""Files that survive crashes: atomic replacement, JSON, JSON lines to append and to follow. Standard library only."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


class Damaged(ValueError):
    """A file that does not hold what it should; the message names the file and the place."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces `path` as a whole: readers, also after a crash, see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise naming(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextlib.contextmanager
def unfinished(part: Path) -> Iterator[None]:
    """Around all that is written into a new directory under a passing name, with its renaming: gone if that fails or is
    broken off, since a full disk needs the room."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def naming(path: Path | str, error: OSError) -> OSError:
    """`error` with the file that it came from."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def sync_directory(path: Path) -> None:
    """A rename is on the disk once its directory is."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def finite(value: Any) -> Any:
    """`value` with each infinity and NaN as None: JSON has no numbers for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Atomic; sorted keys, a space per level; infinities and NaN become null."""
    write_atomic(path, json.dumps(finite(value), sort_keys=True, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError, or Damaged if it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise Damaged(f"{path}: not JSON: {error}") from None


def open_lines(path: Path) -> BinaryIO:
    """A JSON lines file opened for `append_line`, made if need be; what a crash left of a last line is cut off."""
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 - the caller closes it
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)
    return file


def append_line(file: BinaryIO, value: Any) -> None:
    """Adds one row in one write, so that rows of several writers never mix; infinities and NaN become null."""
    line = json.dumps(finite(value), separators=(",", ":"), allow_nan=False).encode() + b"\n"
    try:
        written = os.write(file.fileno(), line)
    except OSError as error:
        raise naming(file.name, error) from error
    if written < len(line):
        raise OSError(f"{file.name}: the disk took only a part of a line")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, without a last line that lacks its end. Raises FileNotFoundError, or Damaged."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return _rows(path, whole.splitlines(), 1)


def _rows(path: Path, lines: list[bytes], first: int) -> list[dict[str, Any]]:
    return [_row(path, number, line) for number, line in enumerate(lines, first)]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        start = line[:60].decode(errors="replace")
        raise Damaged(f"{path}, line {number}: expected a JSON object, got {printable(start)!r}")
    return row


class Tail:
    """Follows a JSON lines file while others append to it, trim it or put another in its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self._offset = 0  # bytes read
        self._count = 0  # lines read
        self._last = b""  # the last line read: no longer there means that this is not the same file

    def new(self) -> list[dict[str, Any]]:
        """Whole rows added since the last call; all of them, if the file was trimmed or replaced. Raises Damaged."""
        try:
            with open(self.path, "rb") as file:
                added = self._added(file)
        except FileNotFoundError:
            self._start_over()
            return []
        whole = added[: added.rfind(b"\n") + 1]
        lines = whole.splitlines(keepends=True)
        rows = _rows(self.path, lines, self._count + 1)
        self._offset += len(whole)
        self._count += len(lines)
        self._last = lines[-1] if lines else self._last
        return rows

    def _added(self, file: BinaryIO) -> bytes:
        file.seek(self._offset - len(self._last))
        data = file.read()
        if data.startswith(self._last):
            return data[len(self._last) :]
        self._start_over()
        file.seek(0)
        return file.read()


def printable(text: str) -> str:
    """`text` on one line, without characters that steer a terminal or hide: names and errors may come from anywhere."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text)
