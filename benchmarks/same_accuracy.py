"""Does a way to compute faster change what is learned? `python -m benchmarks.same_accuracy RECIPE speed.KEY=A speed.KEY=B`.

The recipe is run twice, in folders of their own, with one setting and with the other; told are final accuracies by seed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks import common
from orchestrator.files import read_json

TIMEOUT = 7200.0


def run(recipe: str, setting: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Results by (arm, batch, seed)."""
    folder = tempfile.mkdtemp()
    common.run([sys.executable, "-m", "orchestrator", "run", recipe, "--output", folder, "--set", setting], TIMEOUT)
    results = [read_json(path) for path in Path(folder).glob("*/trials/*/result.json")]
    return {(r["arm"], r["batch"], r["seed"]): r for r in results}


def compare(one: dict[Any, Any], other: dict[Any, Any]) -> list[tuple[str, ...]]:
    rows = []
    for cell in sorted({key[:2] for key in one}):
        seeds = sorted(key[2] for key in one if key[:2] == cell)
        a, b = ([100 * found[(*cell, s)]["final"]["test_accuracy"] for s in seeds] for found in (one, other))
        difference = [y - x for x, y in zip(a, b, strict=True)]
        width = stats.t.ppf(0.975, len(seeds) - 1) * statistics.stdev(difference) / len(seeds) ** 0.5
        mean = statistics.mean(difference)
        interval = f"{mean:+.2f} [{mean - width:+.2f}, {mean + width:+.2f}]"
        rows.append((*map(str, cell), common.spread(a), common.spread(b), interval, str(len(seeds))))
    return rows


def speed(found: dict[Any, dict[str, Any]]) -> str:
    """Images per second, and how many convolutions went by patches."""
    first = next(iter(found.values()))
    rates = common.spread([r["examples_per_second"] for r in found.values()])
    return f"{rates} images/s, {first['precision']}, {first['patch_convolutions']} convolutions by patches"


def main() -> None:
    parser = common.arguments(__doc__ or "", repeats=1)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs=2, metavar="KEY=VALUE")
    options = parser.parse_args()
    print(common.machine())
    with common.scratch():
        found = [run(options.recipe, setting) for setting in options.settings]
        for setting, results in zip(options.settings, found, strict=True):
            print(f"{setting}: {speed(results)}")
        head = ("arm", "batch", *options.settings, "difference, points, 95 % interval of the mean", "seeds")
        rows = compare(*found)
        common.tell(f"Final test accuracy in per cent, {options.recipe}", head, rows, {})
        common.save(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
