"""Griswold's tables 2 and 3, each stage searched by itself: `python -m benchmarks.partial_learning --epochs 1 --points 10`.

His eight networks list 17 stages, of which 12 begin differently. Each of these is a study of the network up to it, with
the best that was found for the stages before; all lie in one folder, where what begins alike is trained once. Run again,
it goes on where it was ended. Selected by test accuracy; what is told comes from seeds that no search has seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import common
from orchestrator.files import read_lines
from orchestrator.recipe import load
from orchestrator.recipe.resolve import axes
from orchestrator.store import Store
from strategies.contract import mix

RECIPE = common.REPOSITORY / "recipes" / "partial_learning.yaml"
STAGES = "workload.model.plain_cnn.stages"
RATE, DECAY = "base.rate.peak", "base.optimizer.sgd.weight_decay"
TIMEOUT = 7200.0
HIS = {  # validation accuracy of CNN 1 to 8, by epochs for each stage
    1: (0.540, 0.510, 0.460, 0.531, 0.144, 0.512, 0.127, 0.531),
    2: (0.618, 0.553, 0.223, 0.542, 0.630, 0.573, 0.134, 0.212),
}
QUICK = ("workload.data=digits", "workload.model.plain_cnn.width=4", "base.steps=2", "search.points=2")
Node: TypeAlias = "tuple[str, ...]"
"""The stages of a network up to one of them."""


@dataclass(frozen=True)
class Found:
    """The best point of a search, trained with fresh seeds."""

    rate: float
    decay: float
    accuracies: list[float]
    seconds: list[float]  # of training, all stages
    trainings: int  # of a stage, in this search


def search(node: Node, before: Sequence[Found], options: argparse.Namespace) -> Found:
    """The last stage of `node`, with what was found for those before it."""
    kept = all(stage.endswith("P") for stage in node[:-1])  # else features take more room than they save time
    parts: dict[str, Any] = {"head": "own", "cache": "fp16" if kept else "off"}
    parts["rates"] = [*(found.rate for found in before), None]
    parts["weight_decay"] = [*(found.decay for found in before), None]
    study = f"partial_{options.epochs:g}_" + "-".join(stage.replace(" ", "") for stage in node)
    settings = [
        f"study={study}", f"grid.{STAGES}={json.dumps([node])}", f"strategies={json.dumps([{'stage_wise': parts}])}",
        "cluster.launcher=solo", f"search.points={options.points}", f"base.epochs={options.epochs:g}",
        f"search.seed={mix(*node) % 10**9}",  # else all stages would try the same values
    ]  # fmt: skip
    settings += QUICK if options.quick else ()
    command = [sys.executable, "-m", "orchestrator", "run", str(RECIPE), "--output", str(options.output.resolve())]
    common.run([*command, *(word for setting in settings for word in ("--set", setting))], TIMEOUT)
    print(f"searched {' | '.join(node)}", file=sys.stderr)
    return found_in(Store(options.output / study))


def found_in(store: Store) -> Found:
    winners = [result for result in store.results() if result["role"] == "winner"]
    journal = read_lines(store.directory / "journal.jsonl")
    return Found(
        rate=winners[0]["point"][RATE],
        decay=winners[0]["point"][DECAY],
        accuracies=[result["final"]["test_accuracy"] for result in winners],
        seconds=[store.rows(result)[-1]["seconds"] for result in winners],
        trainings=sum(row["phases"]["trained"] for row in journal if row["event"] == "trial_ended"),
    )


def search_all(networks: Sequence[Node], options: argparse.Namespace) -> dict[Node, Found]:
    """First stages first; those of one depth do not depend on each other, and begin with the dearest."""
    nodes = {net[: i + 1] for net in networks for i in range(len(net))}
    found: dict[Node, Found] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for depth in range(1, max(map(len, nodes)) + 1):
            level = sorted((n for n in nodes if len(n) == depth), key=lambda n: (-"".join(n).count("C3"), n))
            begun = {node: pool.submit(search, node, path(found, node), options) for node in level}
            found |= {node: one.result() for node, one in begun.items()}
    return found


def path(found: dict[Node, Found], node: Node) -> list[Found]:
    """What was found for each stage of a network, as far as it was searched."""
    beginnings = (node[: i + 1] for i in range(len(node)))
    return [found[beginning] for beginning in beginnings if beginning in found]


def rows(networks: Sequence[Node], found: dict[Node, Found], epochs: float) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for number, net in enumerate(networks, 1):
        stages, whole = path(found, net), found[net]
        rates = " / ".join(common.short(stage.rate) for stage in stages)
        decays = " / ".join(common.short(stage.decay) for stage in stages)
        accuracy = common.spread([100 * value for value in whole.accuracies])
        his = f"{100 * HIS[int(epochs)][number - 1]:.1f}" if epochs in HIS else "-"
        lines.append((str(number), " / ".join(net), rates, decays, common.spread(whole.seconds), accuracy, his))
    return lines


def verdict(networks: Sequence[Node], found: dict[Node, Found]) -> str:
    """What the study was made to find out."""
    middles = [statistics.median(found[net].accuracies) for net in networks]
    return (
        f"{sum(one.trainings for one in found.values())} trainings of a stage, as the journals tell, in {len(found)} "
        f"searches; the networks list {sum(map(len, networks))} stages. Trained as a whole: {middles[0]:.1%}; in parts: "
        f"{min(middles[1:]):.1%} to {max(middles[1:]):.1%}, where chance is 10 %."
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--epochs", type=float, default=1, help="for each stage (default 1)")
    parser.add_argument("--points", type=int, default=10, help="of each search (default 10)")
    parser.add_argument("--jobs", type=int, default=2, help="searches side by side, a core each (default 2)")
    parser.add_argument("--output", type=Path, default=Path("runs/partial_learning"), help="folder of the studies")
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it works, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found, with the machine and versions")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    networks = [tuple(net) for net in axes(load(RECIPE))[STAGES]]
    found = search_all(networks, options)
    head = ("CNN", "stages", "rate", "weight decay", "seconds", "test accuracy, %", "his validation accuracy, %")
    title = f"{options.epochs:g} epochs for each stage, {options.points} points for each search. {common.machine()}"
    common.tell(title, head, rows(networks, found, options.epochs), {})
    print(verdict(networks, found))
    common.save(options.json, {" / ".join(node): vars(one) for node, one in found.items()})


if __name__ == "__main__":
    main()
