"""The most memory of its own that a module of ours ever holds: `python -m benchmarks.peak_memory FILE MODULE ARGUMENTS...`.

Runs the module and writes the bytes, a plain number, to FILE. Counted is anonymous memory: pages of files that are mapped,
such as kept features, can be given back at any time. Linux only.
"""

from __future__ import annotations

import re
import runpy
import sys
import threading
from pathlib import Path

EVERY = 0.002  # seconds


class Sampler(threading.Thread):
    """Looks at this process until `ended` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended, self.peak = threading.Event(), 0

    def run(self) -> None:
        while not self.ended.wait(EVERY):
            self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    """Bytes in use now."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "this kernel does not tell RssAnon"
    return 1024 * int(found[1])


def main() -> None:
    _, file, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    sampler = Sampler()
    sampler.start()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sampler.ended.set()
        sampler.join()
        Path(file).write_text(str(sampler.peak))


if __name__ == "__main__":
    main()
