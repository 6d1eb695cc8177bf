"""The table strategy x engine of docs/engines.md. `python -m tests.cluster.engine_table` writes it."""

from __future__ import annotations

from pathlib import Path

from cluster.engines import OFFERS
from strategies import CATALOGUE
from strategies.contract import Need
from tests.strategies.cases import CASES
from tests.strategies.harness import baseline

BEGIN, END = "<!-- table: written by python -m tests.cluster.engine_table -->\n", "<!-- end of the table -->"
FILE = Path(__file__).parents[2] / "docs" / "engines.md"


def needs(name: str) -> Need:
    case = CASES[name]
    return CATALOGUE[name](**case.acts).edit(case.base(baseline())).needs


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table() -> str:
    lines = [row(["strategy", "needs", *OFFERS]), row(["---"] * (len(OFFERS) + 2))]
    for name in sorted(CATALOGUE):
        asked = needs(name)
        words = ", ".join(sorted(str(n.name) for n in asked)) or "-"
        lines.append(
            row([f"`{name}`", words, *("yes" if asked in offers else "refused" for offers in OFFERS.values())])
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before, rest = FILE.read_text().split(BEGIN)
    FILE.write_text(before + BEGIN + table() + END + rest.split(END)[1])
