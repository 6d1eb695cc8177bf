"""Kills ranks and driver of a study, over and over, and tells what it cost: `python -m benchmarks.soak --kills 200`.

The same three trials are trained unbroken first; then in rounds, under kill -9 at times drawn from a fixed seed, until there
were enough kills. Each round must end with the same weights bit for bit, the same rows, and no process left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import REPOSITORY

RECIPE = """
study: soak
workload: {{data: digits, model: {{mlp: {{width: 32, depth: 2}}}}}}
cluster: {{workers: 2, timeout: 30, max_failures: 1000000}}
base: {{epochs: {epochs}, batch: 16, rate: {{peak: 0.05, decay: cosine}}}}
seeds: 3
precision: fp32
checkpoint: {{mtbf: {gap}}}
log_steps: 20
"""
EARLY, HURRY = 0.2, 5.0  # share of kills that do not wait for the recovery from the one before, and their latest second
PATIENCE = 120.0  # seconds within which a study must be further than at the last kill
GONE = 10.0  # seconds within which no process of a study that has ended may be left
LOOK = 0.05  # seconds


class Wrong(Exception):
    """The study did not come through as it should."""


class Study:
    """The command, started again as often as it is killed."""

    def __init__(self, folder: Path, epochs: int, gap: float):
        folder.mkdir()
        self.folder, self.trials = folder, folder / "runs" / "soak" / "trials"
        (folder / "soak.yaml").write_text(RECIPE.format(epochs=epochs, gap=gap))
        self.family: set[psutil.Process] = set()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "orchestrator", "run", str(self.folder / "soak.yaml"), "-o", "runs"]
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        with open(self.folder / "driver.log", "ab") as log:
            self.driver = psutil.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": path}
            )

    def ended(self) -> bool:
        """Raises Wrong if it ended by itself without having done everything."""
        code = self.driver.poll()
        if code not in (None, 0):
            raise Wrong(f"the driver ended with {code}: {self.folder / 'driver.log'}")
        return code == 0

    def progress(self) -> int:
        """Steps of all trials that have a row on file."""
        return sum(last_step(file) for file in self.trials.glob("*/metrics.jsonl"))

    def ranks(self) -> list[psutil.Process]:
        try:
            children = self.driver.children(recursive=True)
            self.family |= {self.driver, *children}
            return [child for child in children if "Rank" in " ".join(child.cmdline())]
        except psutil.NoSuchProcess:
            return []

    def kill(self, choice: float) -> str:
        """One of two ranks or the driver, for `choice` in [0, 1); the driver where there are no ranks. -> which."""
        candidates = [*self.ranks()[:2], self.driver]
        victim = candidates[int(choice * len(candidates))]
        try:
            victim.kill()
        except psutil.NoSuchProcess:  # it was about to be replaced
            return "nobody"
        if victim is self.driver:
            self.driver.wait()
            self.start()
        return "driver" if victim is candidates[-1] else "rank"

    def close(self) -> None:
        for process in (*self.family, self.driver):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue

    def outcome(self) -> dict[str, Any]:
        """What must be the same as in the unbroken study."""
        weights = {f.parent.name: f.read_bytes() for f in (self.folder / "runs/.phases").glob("*/weights.safetensors")}
        return {
            "weights": weights,
            "rows": {file.parent.name: rows(file) for file in self.trials.glob("*/metrics.jsonl")},
        }

    def productive(self) -> float:
        """Seconds of training and evaluation that count: what was lost to kills is not among them."""
        results = [json.loads(file.read_text())["seconds"] for file in self.trials.glob("*/result.json")]
        return sum((seconds["train"] or 0.0) + (seconds["eval"] or 0.0) for seconds in results)

    def check_gone(self) -> None:
        _, left = psutil.wait_procs(self.family - {self.driver}, timeout=GONE)
        if left:
            raise Wrong(f"left behind: {[' '.join(process.cmdline())[:80] for process in left]}")


def last_step(file: Path) -> int:
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, file.stat().st_size - 2000))
            whole = [line for line in opened.read().split(b"\n")[:-1] if line.startswith(b"{")]
    except FileNotFoundError:
        return 0
    return json.loads(whole[-1])["step"] if whole else 0


def rows(file: Path) -> list[dict[str, Any]]:
    read = map(json.loads, file.read_text().splitlines())
    return [{key: value for key, value in row.items() if "second" not in key} for row in read]


@dataclass
class Account:
    """What was seen so far."""

    kills: dict[str, int] = field(default_factory=dict)
    recoveries: list[float] = field(default_factory=list)  # seconds from a kill until the study was further than then
    wall: float = 0.0
    productive: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    def told(self) -> dict[str, Any]:
        return {
            "kills": self.kills,
            "effective_training_time_ratio": self.productive / self.wall,
            "worst_recovery_seconds": max(self.recoveries, default=0.0),
            "median_recovery_seconds": statistics.median(self.recoveries or [0.0]),
            "mean_seconds_between_kills": self.wall / max(1, self.total),
            "wall_seconds": self.wall,
        }


def torment(study: Study, account: Account, kills: int, gap: float, draw: random.Random) -> None:
    """One round: kills while there are some left, until the study has ended."""
    hit: tuple[float, int] | None = None  # the last kill that it has not recovered from: when, progress then
    due, early, moved = time.monotonic() + draw.uniform(0, 2 * gap), False, time.monotonic()
    while not study.ended():
        time.sleep(LOOK)
        now, progress = time.monotonic(), study.progress()
        if hit and progress > hit[1]:
            account.recoveries.append(now - hit[0])
            study.ranks()  # to be remembered
            hit, moved = None, now
            due = due if early else now + draw.uniform(0, 2 * gap)
        if (hit and now - hit[0] > PATIENCE) or now - moved > 10 * PATIENCE:
            raise Wrong(f"no progress for too long: {study.folder / 'driver.log'}")
        if account.total < kills and now > due and (early or not hit):
            who = study.kill(draw.random())
            account.kills[who] = account.kills.get(who, 0) + (who != "nobody")
            hit, early = (time.monotonic(), study.progress()), draw.random() < EARLY
            due = hit[0] + draw.uniform(0, HURRY) if early else hit[0]
            print(f"kill {account.total}: {who} at step {hit[1]}", file=sys.stderr)


def unbroken(folder: Path, epochs: int, gap: float) -> dict[str, Any]:
    study = Study(folder, epochs, gap)
    try:
        while not study.ended():
            study.ranks()
            time.sleep(LOOK)
        study.check_gone()
        return study.outcome()
    finally:
        study.close()


def soak(folder: Path, kills: int, gap: float, epochs: int, seed: int) -> Account:
    expected = unbroken(folder / "unbroken", epochs, gap)
    account, draw, number = Account(), random.Random(seed), 0
    while account.total < kills:
        number += 1
        began = time.monotonic()
        study = Study(folder / f"round_{number}", epochs, gap)
        try:
            torment(study, account, kills, gap, draw)
            study.check_gone()
        finally:
            study.close()
        account.wall += time.monotonic() - began
        account.productive += study.productive()
        if study.outcome() != expected:
            raise Wrong(f"weights or rows differ from those of the unbroken study: {study.folder}")
        print(f"round {number}: equal to the unbroken study, bit for bit, after {account.total} kills", file=sys.stderr)
    return account


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--gap", type=float, default=10.0, help="mean seconds of training between two kills")
    parser.add_argument("--epochs", type=int, default=100, help="of each of the three trials")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed when")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        account = soak(folder, arguments.kills, arguments.gap, arguments.epochs, arguments.seed)
    except Wrong as error:
        sys.exit(f"soak: {error}")
    told = account.told()
    for name, value in told.items():
        print(f"{name.replace('_', ' ')}: {value if isinstance(value, dict) else f'{value:.3g}'}")
    if arguments.json:
        arguments.json.write_text(
            json.dumps(told | {"options": {k: str(v) for k, v in vars(arguments).items()}}, indent=1)
        )


if __name__ == "__main__":
    main()
