"""The study of the matrix of faults, started in other ways than by `bigbatch run`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.orchestrator.test_faults import GANG, RECIPE, final_weights, rows_of
from tests.orchestrator.test_study_on_ray import Running


class Started(Running):
    """`command` runs the program of ours that takes `run RECIPE -o RUNS`."""

    def __init__(
        self, folder: Path, trials: int, env: dict[str, str], command: Sequence[str], words: Sequence[str] = ()
    ):
        text = RECIPE.replace("NAME", "study").replace("EPOCHS", "2").replace("SEEDS", str(trials))
        recipe, runs = folder / "study.yaml", folder / "runs"
        recipe.write_text(text.replace("CLUSTER", GANG))
        self.study, self.phases = runs / "study", runs / ".phases"
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        line = [*command, "run", str(recipe), "-o", str(runs), *words]
        self.process = subprocess.Popen(line, env=os.environ | env, **pipes)

    def assert_equals(self, unbroken: Running, trials: Sequence[str]) -> None:
        """Weights bit for bit, and rows."""
        assert final_weights(self, set(trials)) == final_weights(unbroken, set(trials))
        assert [rows_of(self, trial) for trial in trials] == [rows_of(unbroken, trial) for trial in trials]
