"""How long tests wait: for what must come, and for what must come at once. All tests may import it.

No test measures speed, which is what `benchmarks/` is for. A limit here tells "at once" from "after a time limit in vain",
and leaves room for a machine that is several times slower than usual.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AT_ONCE = 20.0  # seconds; what would be waited for in vain takes 30 or more


def until(done: Callable[[], bool], seconds: float = 100.0) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.02)


@contextmanager
def at_once(seconds: float = AT_ONCE) -> Iterator[None]:
    """What is inside may not wait for anything."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds
