"""The study directory: the truth about a study, append-only or replaced whole, with one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.files import append_line, open_lines, read_json, read_lines, write_json

FINISHED = ("done", "diverged", "pruned")  # a failed trial is tried again by the next run


class Busy(Exception):
    """Another driver is at work on the study."""


class Store:
    """Paths, results and journal of one study."""

    def __init__(self, directory: Path):
        self.directory = directory

    def trial(self, trial_id: str) -> Path:
        return self.directory / "trials" / trial_id

    def result(self, trial_id: str) -> dict[str, Any] | None:
        path = self.trial(trial_id) / "result.json"
        return read_json(path) if path.exists() else None

    def finished(self, trial_id: str) -> bool:
        result = self.result(trial_id)
        return result is not None and result["status"] in FINISHED

    def results(self) -> list[dict[str, Any]]:
        """All results on file, by trial id."""
        return [read_json(p) for p in sorted(self.directory.glob("trials/*/result.json"))]

    def rows(self, trial_id: str) -> list[dict[str, Any]]:
        path = self.trial(trial_id) / "metrics.jsonl"
        return read_lines(path) if path.exists() else []

    def commit(self, result: dict[str, Any]) -> None:
        """The last thing that happens to a trial: from here on it is done."""
        write_json(self.trial(result["trial"]) / "result.json", result)

    def journal(self, event: str, **fields: Any) -> None:
        with open_lines(self.directory / "journal.jsonl") as file:
            append_line(file, {"time": time.time(), "event": event, **fields})

    def status(self) -> dict[str, Any]:
        path = self.directory / "status.json"
        return read_json(path) if path.exists() else {}

    def write_status(self, status: dict[str, Any]) -> None:
        write_json(self.directory / "status.json", status)

    @contextlib.contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """One driver per study: the kernel frees the lock however the holder ends. Raises Busy unless told to wait."""
        self.directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take(handle, wait)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
        finally:
            os.close(handle)

    def _take(self, handle: int, wait: bool) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace") or "another driver"
            raise Busy(f"{self.directory} is being run by {holder}: wait for it (--wait), or end it first") from None
