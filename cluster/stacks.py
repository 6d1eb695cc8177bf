"""Where the threads of a rank stand, written down at a signal: asked of ranks that hang, before they are killed."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

import psutil

SIGNAL = signal.SIGUSR2
TIME_TO_WRITE = 0.5  # seconds


@contextlib.contextmanager
def written_to(file: TextIO) -> Iterator[None]:
    """Within, at `SIGNAL`, this process adds the stacks of all its threads to `file`, also while it holds the interpreter."""
    faulthandler.register(SIGNAL, file, all_threads=True)
    try:
        yield
    finally:
        faulthandler.unregister(SIGNAL)


def ask(processes: Iterable[psutil.Process]) -> None:
    """Have processes, which will be killed next, write their stacks; a stopped one goes on, or it would not hear."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(SIGNAL)
            process.resume()
    time.sleep(TIME_TO_WRITE)
