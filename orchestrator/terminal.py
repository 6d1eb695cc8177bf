"""What is said to people: text from recipes, files and errors, without characters that would steer their terminal."""

from __future__ import annotations

import sys


def shown(text: str) -> str:
    """`text` with its lines and tabs, and nothing else that is not printable."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def say(text: str) -> None:
    print(shown(text), file=sys.stderr, flush=True)
