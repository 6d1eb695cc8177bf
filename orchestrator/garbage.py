"""Finished phases and kept features that no study of a folder refers to: found, and deleted if asked to."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.files import Damaged, read_json
from orchestrator.store import Store


@dataclass(frozen=True, slots=True)
class Unused:
    path: Path
    bytes: int

    @property
    def kind(self) -> str:
        """By its name: `<key>`, `<key>.<store>`; what begins with a dot was left behind by a writer that was killed."""
        return "part" if self.path.name.startswith(".") else "features" if "." in self.path.name else "phase"


def collect(runs: Path, delete: bool) -> list[Unused]:
    """What no trial of the folder's studies uses, in the order of names; deleted where asked to.

    Raises Busy while a study runs, which may take up what nobody uses as yet; Damaged if a trial's list cannot be read;
    FileNotFoundError if there is no such folder.
    """
    if not runs.is_dir():
        raise FileNotFoundError(2, "no such folder", str(runs))
    if not delete:
        return unused(runs)
    with contextlib.ExitStack() as held:
        for study in studies(runs):
            held.enter_context(Store(study).lock())
        found = unused(runs)
        for item in found:
            _delete(item.path)
        for sign in runs.glob(".driver-*"):  # an empty file of a driver that was killed: none is at work here now
            sign.unlink(missing_ok=True)
    return found


def unused(runs: Path) -> list[Unused]:
    """Among `runs/.phases`. What is being written counts as unused: none is while all studies are locked."""
    kept = {name for study in studies(runs) for name in _used(study)}
    folders = sorted(path for path in (runs / ".phases").glob("*") if path.is_dir() and path.name not in kept)
    return [Unused(path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file())) for path in folders]


def studies(runs: Path) -> list[Path]:
    """Also those that were moved aside."""
    return sorted(path for path in runs.iterdir() if (path / "trials").is_dir() or (path / "journal.jsonl").exists())


def _used(study: Path) -> Iterator[str]:
    for path in study.glob("trials/*/phases.json"):
        names = read_json(path)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Damaged(f"{path}: not a list of names; remove {path.parent} to train the trial again")
        yield from names


def _delete(path: Path) -> None:
    """Under another name first, so that a phase is there whole or not at all."""
    gone = path.with_name(f".{path.name.lstrip('.')}.deleted")
    path.rename(gone)
    shutil.rmtree(gone)


def as_text(found: list[Unused], runs: Path, delete: bool) -> str:
    """One line for each folder, and one with the sums."""
    lines = [f"{item.bytes:>14,}  {item.kind:8}  {item.path.name}" for item in found]
    done = "deleted" if delete else "delete them with --delete" if found else "nothing to delete"
    total = sum(item.bytes for item in found)
    return "\n".join(
        [*lines, f"{total:>14,}  bytes in {len(found)} folders of {runs / '.phases'} unused by any study: {done}"]
    )
