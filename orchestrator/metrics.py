"""`metrics.jsonl` of one trial, written by rank 0: a row per logged step, steps strictly increasing, also after a resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.files import append_line, naming, open_lines, read_lines, write_atomic


class Rows:
    """`writes` is false on every rank but the first: then nothing is touched."""

    def __init__(self, path: Path, writes: bool):
        self.path, self.writes = path, writes
        self.file: BinaryIO | None = None

    def trim(self, last_step: int) -> None:
        """Forget rows after `last_step`: they will be made again."""
        if self.writes:
            rows = [row for row in self.read() if row["step"] <= last_step]
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows))
            self.file = open_lines(self.path)

    def add(self, row: dict[str, Any]) -> None:
        """One row; what is not finite becomes null. `trim` comes first."""
        if self.file:
            append_line(self.file, row)

    def extend(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self.add(row)

    def of_phase(self, phase: int) -> list[dict[str, Any]]:
        return [row for row in self.read() if row["phase"] == phase]

    def read(self) -> list[dict[str, Any]]:
        """All rows on file, none if there is no file."""
        return read_lines(self.path) if self.path.exists() else []

    def last_step(self) -> int:
        rows = self.read()
        return rows[-1]["step"] if rows else 0

    def sync(self) -> None:
        """What is to outlive a power failure only together with its rows comes after this."""
        if self.file:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                raise naming(self.path, error) from error

    def close(self) -> None:
        if self.file:
            self.sync()
            self.file.close()
