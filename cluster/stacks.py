"""Where the threads of a process stand, written down at a signal: asked of ranks that hang, before they are killed."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

import psutil

SIGNAL = signal.SIGUSR2
STDERR = 2
TIME_TO_WRITE = 0.5  # seconds


def listen() -> None:
    """From now on, at `SIGNAL`, this process writes the stacks of all its threads to stderr; by itself, it would end."""
    faulthandler.register(SIGNAL, STDERR, all_threads=True)


@contextlib.contextmanager
def written_to(file: TextIO) -> Iterator[None]:
    """Within, they are added to `file`. Heard also while the process holds the interpreter."""
    faulthandler.register(SIGNAL, file, all_threads=True)
    try:
        yield
    finally:
        listen()


def ask(processes: Iterable[psutil.Process]) -> None:
    """Have processes, which will be killed next, write their stacks; a stopped one goes on, or it would not hear."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(SIGNAL)
            process.resume()
    time.sleep(TIME_TO_WRITE)
