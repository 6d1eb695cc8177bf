"""The user's Ray cluster, as the environment names it. No ray."""

from __future__ import annotations

import os


def address() -> str:
    """Of the user's cluster; empty where there is none to be used: `local` is Ray's word for a new one."""
    named = os.environ.get("RAY_ADDRESS", "")
    return "" if named == "local" else named
