"""A study of eight trials that take no time, for tests of what studies do around them."""

from __future__ import annotations

from pathlib import Path

from orchestrator.recipe import load
from orchestrator.study import Study

RECIPE = """
study: small
workload:
  data: digits
  model: {mlp: {width: 16, depth: 2}}
  target: {test_accuracy: 0.5}
cluster: {launcher: solo}
base: {epochs: 2, batch: 128, rate: {peak: 0.2}}
arms:
  sgd: {}
  smooth: {strategies: [label_smoothing: {amount: 0.1}]}
grid: {base.batch: [128, 512]}
seeds: 2
"""


def study(runs: Path, *sets: str, text: str = RECIPE) -> Study:
    runs.parent.mkdir(parents=True, exist_ok=True)
    path = runs.parent / "recipe.yaml"
    path.write_text(text)
    return Study(load(path, sets), text, runs)
