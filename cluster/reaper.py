"""Ends what is left of a private Ray cluster once its driver has gone, however it went: some of Ray's processes notice a
killed driver only after a minute. Run as a script, with a pipe from the driver that tells the cluster's directory in a line."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterable

import psutil

SETTLE = 0.3  # seconds until a process that was just being forked can be told from its parent


def family(directory: str) -> set[psutil.Process]:
    """The processes of the cluster that keeps its files in `directory`, and all that they started."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if belongs(process, directory):
                found |= {process, *process.children(recursive=True)}
    return found


def belongs(process: psutil.Process, directory: str) -> bool:
    """Told by its command, or by its log where it has given itself another title: parents may be gone before it."""
    command = process.cmdline()
    if command and command[0].startswith("ray::"):
        return any(file.path.startswith(directory) for file in process.open_files())
    return any(directory in word for word in command)


def end(processes: Iterable[psutil.Process]) -> None:
    """Never another process with the same id: each remembers when it began."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> None:
    directory = sys.stdin.readline().strip()
    sys.stdin.read()  # until the driver closes the pipe, or dies
    while directory and (found := family(directory)):
        end(found)
        time.sleep(SETTLE)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
