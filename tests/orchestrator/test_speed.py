"""What `speed` switches changes no result: rows and weights of a study in float64 with each switch turned, and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from orchestrator.driver import drive
from orchestrator.files import read_lines
from tests.orchestrator.small_study import study
from tests.orchestrator.test_trainer import without_seconds

PLAIN = """
study: small
workload: {data: digits, model: {small_cnn: {width: 4, batch_norm: true}}, augment: {crop: 1}}
cluster: {launcher: solo}
precision: fp64
speed: {patch_convolutions: false, keep_memory: false, channels_last: false}
base: {epochs: 2, batch: 256, rate: {peak: 0.2}}
log_steps: 1
"""


def run(runs: Path, *sets: str) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """How many convolutions went by patches, rows, and the weights at the end."""
    asked = study(runs, *sets, text=PLAIN)
    assert drive(asked) == 0
    (trial,), (weights,) = asked.trials, runs.glob(".phases/*/weights.safetensors")
    rows = without_seconds(read_lines(asked.store.trial(trial.id) / "metrics.jsonl"))
    return asked.store.result(trial.id)["patch_convolutions"], rows, load_file(weights)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("plain") / "runs")


@pytest.mark.parametrize(
    ("switch", "patched"), [("patch_convolutions", 3), ("keep_memory", 0), ("channels_last", 0)], ids=lambda v: str(v)
)
def test_a_switch_changes_rounding_at_most(tmp_path: Path, plain: Any, switch: str, patched: int) -> None:
    by_patches, rows, weights = run(tmp_path / "runs", f"speed.{switch}=true")
    assert by_patches == patched and plain[0] == 0
    assert rows == [pytest.approx(row, rel=1e-9) for row in plain[1]] and len(rows) == 12
    for name, w in plain[2].items():
        assert weights[name] == pytest.approx(w, rel=1e-9, abs=1e-11)
