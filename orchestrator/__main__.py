"""`python -m orchestrator` and the command `bigbatch`."""

from __future__ import annotations


def main() -> None:
    from orchestrator.cli import app

    app()


if __name__ == "__main__":
    main()
