"""Ctrl-C, SIGTERM and the SIGUSR1 of batch schedulers: a driver ends its study in order, or at once where it trains itself."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

TERMINATED = 75
CODES = {signal.SIGINT: 130, signal.SIGTERM: TERMINATED, signal.SIGUSR1: TERMINATED}  # exit codes


class Stopped(BaseException):
    """Raised by the signal itself, where nobody would look at `Signals.code` soon enough."""


class Signals:
    """A context. `code` is the exit code that a signal asks for, None before one has come.

    A first signal is noted only: raised within Ray's compiled code it would end in a SystemError. A second one, or the first if
    `at_once`, raises Stopped.
    """

    def __init__(self, at_once: bool):
        self.at_once = at_once
        self.code: int | None = None

    def __enter__(self) -> Signals:
        self.before = {sign: signal.getsignal(sign) for sign in CODES}
        self.arm()
        return self

    def arm(self) -> None:
        """Again after `ray.init`, which puts in a handler of its own."""
        for sign in CODES:
            signal.signal(sign, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.code = self.code is not None, CODES[signal.Signals(number)]
        if self.at_once or again:
            raise Stopped

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for sign, handler in self.before.items():
            signal.signal(sign, handler)
