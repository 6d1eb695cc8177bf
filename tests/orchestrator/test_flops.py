"""FLOPs of training: by hand for single layers, alike however they are computed, in rows, results and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.engines import make_worker
from orchestrator import flops
from orchestrator.recipe.workload_schema import Target
from orchestrator.report import export
from orchestrator.report.captions import notes
from orchestrator.report.load import load
from orchestrator.report.summary import summarise
from orchestrator.report.tables import cells_table, trials_table
from orchestrator.results import outcome
from strategies.contract import Batch
from strategies.net import Net
from tests.orchestrator.made_study import MadeStudy
from tests.strategies.harness import Blobs, baseline, train


def counted(net: Net, *shape: int) -> float:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    worker = make_worker("solo", {}, "fp32", 0, 1, torch.device("cpu"))
    return flops.per_example(net, Batch(x, torch.zeros(2, dtype=torch.int64), torch.arange(2)), worker)


def test_by_hand() -> None:
    """Forward, the gradient of weights and, behind the first layer, that of inputs: each 2 per weight and position."""
    linear = Net([nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)])
    assert counted(linear, 5) == 2 * (2 * 5 * 7 + 3 * 7 * 3)
    first, second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 5, stride=2, padding=2, groups=2)
    convolutions = Net([first, nn.BatchNorm2d(4), nn.ReLU(), second])
    assert counted(convolutions, 2, 8, 8) == 2 * (2 * 64 * 2 * 9 * 4 + 3 * 16 * 2 * 25 * 6)
    assert counted(Net([nn.Flatten()]), 5) == 0


def test_the_net_is_left_as_it_was() -> None:
    net = Net([nn.Linear(5, 4), nn.BatchNorm1d(4)])
    before = {name: t.clone() for name, t in net.state_dict().items()}
    counted(net, 5)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_what_does_not_fit_is_not_counted() -> None:
    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    assert counted(Net([Greedy()]), 5) != counted(Net([Greedy()]), 5)


def test_rows_and_progress(tmp_path: Path) -> None:
    """Cumulative, by the global batch, also through a resume."""
    whole = train(baseline(), tmp_path / "a")
    per_example = 2 * (2 * 6 * 8 + 3 * 8 * 3)
    assert [row["flops"] for row in whole.rows] == [12 * per_example * (n + 1) for n in range(12)]
    assert whole.progress.flops == 12 * 12 * per_example
    with pytest.raises(InterruptedError):
        train(baseline(), tmp_path / "b", Blobs(fail_at=60), save_seconds=0)
    resumed = train(baseline(), tmp_path / "b", save_seconds=0)
    assert [row["flops"] for row in resumed.rows] == [row["flops"] for row in whole.rows]


def test_flops_to_target() -> None:
    rows = [{"step": n, "flops": 1e9 * n, "test_accuracy": 0.1 * n} for n in range(1, 10)]
    assert outcome(rows, Target(test_accuracy=0.5))["target"]["flops"] == 5e9
    assert outcome(rows, Target(test_accuracy=0.95))["target"]["flops"] is None


def test_report(tmp_path: Path) -> None:
    """Columns and what they mean where trials counted, none where they did not."""
    for name, told in (("with", True), ("without", False)):
        made = MadeStudy(tmp_path / name)
        for seed in range(3):
            counts: dict[str, Any] = {"flops": 5e12} if told else {}
            path = tmp_path / name / "trials" / made.add("small", 32, seed, reached=100.0, **counts) / "result.json"
            result: dict[str, Any] = json.loads(path.read_text())
            result["target"] |= {"flops": (1 + seed) * 1e12} if told else {}
            path.write_text(json.dumps(result))
        summary = summarise(load(tmp_path / name, made.ids))
        cells, trials = cells_table(summary), trials_table(summary)
        assert (("FLOPs to target" in cells.header), ("training FLOPs" in trials.header)) == (told, told)
        assert any("is not counted" in note for note in notes(summary)) == told
        if told:
            assert cells.rows[0][cells.header.index("FLOPs to target")] == "2.00e+12"  # the median
            assert [row[trials.header.index("FLOPs to target")] for row in trials.rows] == [
                "1.00e+12",
                "2.00e+12",
                "3.00e+12",
            ]
        columns = export.table(summary.study.results).to_pydict()
        assert columns["target_flops"] == ([1e12, 2e12, 3e12] if told else [None] * 3)
        assert columns["flops"] == ([5e12] * 3 if told else [None] * 3)
