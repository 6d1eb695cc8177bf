"""Copies of the driver's files on nodes that do not see them, and what ranks there write on its way back. No ray.

A path of the driver's, /a/b, is kept on such a node as MIRROR/GANG/a/b. Logs and rows come back as they grow; other files
come back whole, and a directory that is new appears on the driver's side all at once, as its writer made it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GROWING = (".jsonl", ".log")  # files that are appended to
TAIL = 200  # bytes of a growing file that tell whether it is still the same one
PREFIX = "bigbatch-mirror-"
moved: Path | None = None  # where this process finds the driver's files; None: where they are


def mirrored() -> bool:
    """Whether this process works on copies."""
    return moved is not None


def local(path: Path) -> Path:
    """Where this process finds a path of the driver's."""
    return beneath(moved, path) if moved else path


def beneath(top: Path, path: Path) -> Path:
    return top / path.relative_to("/")


@dataclass(frozen=True)
class Change:
    """A file that differs from what the driver has: its content from byte `start` on, or None if it is gone."""

    path: Path  # the driver's
    content: bytes | None
    start: int = 0


@dataclass(frozen=True)
class Stamp:
    """A file as it was last seen."""

    size: int
    modified: int  # nanoseconds
    tail: bytes  # its last bytes, of a growing file


class Mirror:
    """One node's copies, for all gangs of a driver."""

    def __init__(self) -> None:
        remove_abandoned()
        fresh = Path(tempfile.mkdtemp(prefix="bigbatch-new-"))
        self.lock = open(fresh / ".lock", "wb")  # noqa: SIM115 - held for life: it says that somebody is here
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.root = fresh.rename(fresh.with_name(fresh.name.replace("bigbatch-new-", PREFIX)))
        self.writes: dict[str, Sequence[Path]] = {}  # by gang
        self.known: dict[str, dict[Path, Stamp]] = {}

    def missing(self, folders: Sequence[Path]) -> list[Path]:
        """Of these folders, which never change, those that this node has not."""
        return [folder for folder in folders if not folder.exists() and not self._constant(folder).exists()]

    def keep(self, folder: Path, files: Mapping[Path, bytes]) -> None:
        """A folder that never changes, for all gangs."""
        for path, content in files.items():
            write(self._constant(path), content)

    def _constant(self, path: Path) -> Path:
        return beneath(self.root / "constant", path)

    def receive(
        self, gang: str, writes: Sequence[Path], files: Mapping[Path, bytes], constant: Sequence[Path] = ()
    ) -> Path:
        """The folders in which a task writes, with these files in them and no others. -> what is `moved` in its ranks."""
        top = self.root / "gangs" / gang
        shutil.rmtree(top, ignore_errors=True)
        for folder in writes:
            beneath(top, folder).mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            write(beneath(top, path), content)
        for folder in constant:
            link = beneath(top, folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder if folder.exists() else self._constant(folder))
        self.writes[gang] = writes
        self.known[gang] = {path: stamp(copy) for path, copy in self._files(gang)}
        return top

    def changes(self, gang: str) -> list[Change]:
        """What differs from the last call, or from what was received; what is new or longer comes before what is gone.

        Rows are read after the checkpoints beneath them, and come before them: no checkpoint comes without its row.
        """
        old, self.known[gang] = self.known[gang], {}
        found: list[Change] = []
        for path, copy in sorted(self._files(gang), key=lambda pair: -len(pair[0].parts)):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                self.known[gang][path], change = compared(path, copy, old.get(path))
                found += [change] if change else []
        found.sort(key=lambda change: len(change.path.parts))
        return found + [Change(path, None) for path in old.keys() - self.known[gang].keys()]

    def _files(self, gang: str) -> Iterator[tuple[Path, Path]]:
        """(the driver's path, the copy) of each file that is whole: what begins with a dot is being written."""
        top = self.root / "gangs" / gang
        for folder in self.writes[gang]:
            for path in visible(beneath(top, folder)):
                yield Path("/") / path.relative_to(top), path

    def forget(self, gang: str) -> None:
        shutil.rmtree(self.root / "gangs" / gang, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def remove_abandoned() -> None:
    """Mirrors whose process was killed: the kernel has freed their locks."""
    for root in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), open(root / ".lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(root, ignore_errors=True)


def visible(folder: Path) -> Iterator[Path]:
    """All files below `folder` but those that are hidden, or in a hidden directory."""
    for here, directories, names in os.walk(folder):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        yield from (Path(here, name) for name in sorted(names) if not name.startswith("."))


def stamp(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, path.read_bytes()[-TAIL:] if grows(path) else b"")


def grows(path: Path) -> bool:
    return path.suffix in GROWING


def compared(path: Path, copy: Path, old: Stamp | None) -> tuple[Stamp, Change | None]:
    """The file as it is now, and how it differs from `old`."""
    with open(copy, "rb") as file:
        status = os.fstat(file.fileno())
        if old and (old.size, old.modified) == (status.st_size, status.st_mtime_ns):
            return old, None
        start = max(0, old.size - len(old.tail)) if old and grows(copy) else 0
        file.seek(start)
        content = file.read()
    if old and grows(copy) and content.startswith(old.tail):
        now = Stamp(start + len(content), status.st_mtime_ns, content[-TAIL:])
        return now, Change(path, content[len(old.tail) :], old.size) if now.size > old.size else None
    content = copy.read_bytes() if start else content
    return Stamp(len(content), status.st_mtime_ns, content[-TAIL:] if grows(copy) else b""), Change(path, content)


# --------------------------------------------------------------------------------------------------- the driver's side


def contents(folders: Iterable[Path], logs_only: bool = False) -> dict[Path, bytes]:
    """The files below these folders, as far as they are there."""
    paths = (path for folder in folders for path in visible(folder))
    return {path: path.read_bytes() for path in paths if not logs_only or path.suffix == ".log"}


def take_in(changes: Iterable[Change], writes: Sequence[Path]) -> None:
    """Make the driver's files like those of the node. Raises ValueError for a path outside the folders `writes`."""
    fresh: dict[Path, Path] = {}  # a directory that is not there yet -> where it is made
    for change in changes:
        if ".." in change.path.parts or not any(folder in change.path.parents for folder in writes):
            raise ValueError(f"{change.path} is not in {', '.join(map(str, writes))}")
        new = topmost_missing(change.path.parent)
        if new and change.content is not None:
            part = fresh.setdefault(new, new.with_name(f".{new.name}.{os.getpid()}.part"))
            write(part / change.path.relative_to(new), change.content)
        elif not new:
            take_in_one(change, writes)
    for final, part in fresh.items():
        try:
            part.rename(final)
        except OSError:  # made by another gang meanwhile
            shutil.rmtree(part)


def make_sign(folder: Path | None) -> Path | None:
    """A new file in `folder` that only those can see who see the driver's files."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    sign = folder / f".driver-{secrets.token_hex(8)}"
    sign.touch()
    return sign


def remove_sign(sign: Path | None) -> None:
    if sign:
        sign.unlink(missing_ok=True)


def topmost_missing(folder: Path) -> Path | None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return missing[-1] if missing else None


def take_in_one(change: Change, writes: Sequence[Path]) -> None:
    path = change.path
    if change.content is None:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            if path.parent not in writes:
                path.parent.rmdir()
    elif change.start:
        with open(path, "r+b") as file:
            file.seek(change.start)
            file.truncate()
            file.write(change.content)
    else:
        write(path, change.content)


def write(path: Path, content: bytes) -> None:
    """Replaces a file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
