"""A study whose modules have workers of their own, and one of these is killed: a new gang goes on from what was drained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from tests.orchestrator.test_study_on_ray import Running
from tests.waiting import until

RECIPE = """
study: NAME
workload: {data: digits, model: {mlp: {width: 32, depth: 4}}, target: {test_accuracy: 0.9}}
engine: ddp
cluster: CLUSTER
base: {epochs: EPOCHS, batch: 16, rate: {peak: 0.05, decay: cosine}}
strategies: [STRATEGY]
seeds: SEEDS
precision: fp32
checkpoint: {seconds: 0}
log_steps: 20
"""
STRATEGIES = {
    "delayed": "{delayed_gradient: {cuts: [2], variant: fdg, ahead: 1}}",
    "synthetic": "{synthetic_gradient: {cuts: [2], roles: true, queue: 2}}",
}


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without cosines, too, of which those of a row are told in the next: a checkpoint does not have them."""
    return [
        {k: v for k, v in row.items() if not any(t in k for t in ("second", "occupancy", "cosine"))} for row in rows
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", STRATEGIES)
def test_a_lost_role_is_made_again(method: str, tmp_path: Path) -> None:
    text = RECIPE.replace("STRATEGY", STRATEGIES[method])
    unbroken = Running(tmp_path / "unbroken", text=text, epochs=5)
    code, err = unbroken.end()
    assert code == 0, err
    broken = Running(tmp_path / "broken", text=text, epochs=5)
    until(lambda: any(row["step"] >= 100 for row in broken.rows()), 150)
    kept = broken.rows()[:-2]  # of these there is a checkpoint
    broken.ranks()[1].kill()
    code, err = broken.end()
    assert code == 0, err
    assert len(broken.events("worker_lost")) == 1
    assert [e["attempt"] for e in broken.events("trial_started")] == [1, 2]
    assert broken.rows()[: len(kept)] == kept != []  # with their times: they were not made again
    assert all(result["roles"] == 2 for result in broken.results().values())
    assert broken.weights() == unbroken.weights() != {}
    assert untimed(broken.rows()) == untimed(unbroken.rows())
