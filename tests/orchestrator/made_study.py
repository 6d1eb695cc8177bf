"""Makes study directories as the orchestrator leaves them, with results that a formula decides."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

EXAMPLES = 1437  # in the data set
ENV = {
    "bigbatch": "0.1.0",
    "packages": {"torch": "2.13.0", "ray": "2.60.0"},
    "cpu": "Example CPU 2.0 GHz",
    "cores": {"physical": 2, "logical": 4},
    "gpus": [],
    "command": ["bigbatch", "run", "quickstart.yaml"],
}


class MadeStudy:
    def __init__(
        self, path: Path, name: str = "quickstart", target: tuple[str, float] | None = ("test_accuracy", 0.95)
    ):
        self.path, self.target = path, target
        self.ids: list[str] = []
        self.arms: dict[str, Any] = {}
        (path / "trials").mkdir(parents=True)
        (path / "env.json").write_text(json.dumps(ENV))
        (path / "recipe.yaml").write_text(f"study: {name}\ngrid: {{base.batch: [32, 128]}}\n")
        self.name = name

    def add(self, arm: str, batch: int, seed: int, reached: float = math.inf, **changes: Any) -> str:
        """One trial that reaches the target in `reached` steps, inf for never; `changes` replace fields of its result."""
        trial = f"{len(self.ids):012x}"
        self.ids.append(trial)
        self.arms.setdefault(arm, {})
        (self.path / "resolved.yaml").write_text(
            yaml.safe_dump({"study": self.name, "arms": self.arms}, sort_keys=False)
        )
        folder = self.path / "trials" / trial
        folder.mkdir()
        self._write(folder, {**self._result(trial, arm, batch, seed, reached), **changes})
        return trial

    def _write(self, folder: Path, result: Mapping[str, Any]) -> None:
        workload = {"data": {"digits": {}}, "evaluate": {"epochs": 0.5}}
        config = {"arm": result["arm"], "base": {"epochs": 20, "batch": result["batch"]}, "workload": workload}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "result.json").write_text(json.dumps(result))
        rows = list(self._rows(result))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _result(self, trial: str, arm: str, batch: int, seed: int, reached: float) -> dict[str, Any]:
        steps = math.ceil(20 * EXAMPLES / batch)
        final = {"test_accuracy": 0.97 - 0.00002 * batch + 0.002 * seed, "test_loss": 0.1, "train_loss": 0.05}
        hit = math.isfinite(reached)
        at = int(reached) if hit else 0
        found = {
            "step": at,
            "examples": at * batch,
            "epochs": at * batch / EXAMPLES,
            "seconds": at * (0.002 + batch * 1e-5),
        }
        target = {"metric": self.target[0], "value": self.target[1], "reached": hit} if self.target else None
        return {
            "trial": trial,
            "arm": arm,
            "batch": batch,
            "seed": seed,
            "point": {"base.batch": batch},
            "status": "done",
            "steps": steps,
            "epochs": 20.0,
            "examples": steps * batch,
            "final": final,
            "best": {"test_accuracy": final["test_accuracy"] + 0.001},
            "target": target and {**target, **(found if hit else dict.fromkeys(found))},
            "seconds": {"startup": 1.5, "data": 0.1, "train": steps * 0.003, "eval": 0.2},
            "examples_per_second": batch / 0.003,
            "workers": 2,
            "threads": 1,
            "micro_batch": batch // 2,
            "precision": "fp32",
            "device": "cpu",
            "parameters": 26122,
            "reused": False,
            "error": None,
        }

    def _rows(self, result: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        """A rising accuracy with noise; a falling loss in between."""
        noise = random.Random(str((result["arm"], result["batch"], result["seed"])))
        rows = []
        for half in range(1, 41):
            epoch, step = half / 2, math.ceil(half / 2 * EXAMPLES / result["batch"])
            row = {
                "step": step,
                "phase": 0,
                "epoch": epoch,
                "seconds": step * 0.003,
                "train_loss": 2.3 * math.exp(-epoch / 4),
            }
            for metric, value in result["final"].items():
                if metric == "test_accuracy" and value is not None:
                    row[metric] = value - 0.85 * math.exp(-epoch * len(result["arm"]) / 9) + noise.gauss(0, 0.004)
                elif metric == "test_loss":
                    row[metric] = 2.3 * math.exp(-epoch / 5)
            rows.append(row)
        return rows


def quickstart(path: Path) -> MadeStudy:
    """Two arms, four batch sizes, three seeds; adamw misses its target twice at the largest batch size."""
    study = MadeStudy(path)
    medians = {"sgd": (310, 79, 36, 16), "adamw": (290, 85, 40, 18)}
    for arm, steps in medians.items():
        for batch, middle in zip((32, 128, 512, 1437), steps, strict=True):
            for seed in range(3):
                missed = arm == "adamw" and batch == 1437 and seed > 0
                study.add(arm, batch, seed, math.inf if missed else round(middle * (1, 0.95, 1.1)[seed]))
    return study
