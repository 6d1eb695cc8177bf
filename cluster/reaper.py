"""Ends what is left of a private Ray cluster once its driver has gone, however it went: some of Ray's processes notice a
killed driver only after a minute. Run as a script: reaper.py DIRECTORY PID..., with a pipe from the driver as its input."""

from __future__ import annotations

import contextlib
import shutil
import sys

import psutil


def main(directory: str, *pids: str) -> None:
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(int(pid)))  # remembers when it began: never another with its id
    sys.stdin.read()  # until the driver closes the pipe, or dies
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
