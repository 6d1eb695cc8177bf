"""`python -m orchestrator` and the command `bigbatch`."""

from __future__ import annotations

import sys

from cluster import torchrun


def main() -> None:
    if torchrun.following():
        sys.exit(torchrun.follow())
    from orchestrator.cli import app

    with torchrun.leading():
        app()


if __name__ == "__main__":
    main()
