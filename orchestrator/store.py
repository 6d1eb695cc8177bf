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

from orchestrator.environment import redact
from orchestrator.files import Damaged, append_line, open_lines, read_json, read_lines, write_json

FINISHED = ("done", "diverged", "pruned")  # a failed trial is tried again by the next run


SHOWN = {"trial", "arm", "batch", "seed", "status"}  # what every result has, also that of a failed trial


class Busy(Exception):
    """Another driver is at work on the study."""


@contextlib.contextmanager
def told(trial: Path) -> Iterator[None]:
    """Adds the way out to the news of a damaged file."""
    try:
        yield
    except Damaged as error:
        raise Damaged(f"{error}; remove {trial} to train the trial again") from None


class Store:
    """Paths, results and journal of one study."""

    def __init__(self, directory: Path):
        self.directory = directory

    def trial(self, trial_id: str) -> Path:
        return self.directory / "trials" / trial_id

    def result(self, trial_id: str) -> dict[str, Any] | None:
        """Raises Damaged for what is no result."""
        path = self.trial(trial_id) / "result.json"
        if not path.exists():
            return None
        with told(path.parent):
            result = read_json(path)
            if not isinstance(result, dict) or not result.keys() >= SHOWN:
                raise Damaged(f"{path}: not the result of a trial")
        return result

    def finished(self, trial_id: str) -> bool:
        result = self.result(trial_id)
        return result is not None and result["status"] in FINISHED

    def trial_ids(self) -> list[str]:
        """The trials of the recipe as it was last run; trials of an earlier form of it may lie beside them. Raises Damaged."""
        path = self.directory / "trials.json"
        if not path.exists():
            return sorted(p.name for p in self.directory.glob("trials/*/") if not p.name.startswith("."))
        ids = read_json(path)
        if not isinstance(ids, list) or not all(isinstance(trial_id, str) for trial_id in ids):
            raise Damaged(f"{path}: not a list of trials; the next run of the recipe writes it anew")
        return ids

    def results(self) -> list[dict[str, Any]]:
        """Results on file, in the order of the recipe."""
        return [result for trial_id in self.trial_ids() if (result := self.result(trial_id))]

    def rows(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        """The curve behind a result. Raises Damaged if it is not all there."""
        path, steps = self.trial(result["trial"]) / "metrics.jsonl", result.get("steps")
        with told(path.parent):
            rows = read_lines(path) if path.exists() else []
            if (rows[-1].get("step") if rows else None) != steps:
                raise Damaged(f"{path}: does not reach step {steps}, at which the trial ended")
        return rows

    def commit(self, result: dict[str, Any]) -> None:
        """The last thing that happens to a trial: from here on it is done."""
        write_json(self.trial(result["trial"]) / "result.json", redact(result))

    def journal(self, event: str, **fields: Any) -> None:
        with open_lines(self.directory / "journal.jsonl") as file:
            append_line(file, redact({"time": time.time(), "event": event, **fields}))

    def status(self) -> dict[str, Any]:
        """Empty if there is none that can be read: nothing depends on it."""
        try:
            status = read_json(self.directory / "status.json")
        except (FileNotFoundError, Damaged):
            return {}
        return status if isinstance(status, dict) else {}

    def write_status(self, status: dict[str, Any]) -> None:
        write_json(self.directory / "status.json", redact(status))

    @contextlib.contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """One driver per study: the kernel frees the lock however the holder ends. Raises Busy unless told to wait."""
        path = self.directory / ".lock"
        with contextlib.ExitStack() as held:
            file = None
            while not (file and path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                held.close()  # of a study that was moved aside while we waited
                self.directory.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(open(path, "a+b", buffering=0))
                self._take(file.fileno(), wait)
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}".encode())
            yield

    def _take(self, handle: int, wait: bool) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace") or "another driver"
            raise Busy(f"{self.directory} is being run by {holder}: wait for it (--wait), or end it first") from None
