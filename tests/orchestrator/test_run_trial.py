"""One trial on one worker: what a gang calls, over and over."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from cluster.engines import make_worker
from orchestrator.recipe import expand, load
from orchestrator.run_trial import Assignment, rank_log, run_trial
from orchestrator.trial import Trial
from orchestrator.workloads import fingerprint

RECIPE = """
study: many
workload: {data: digits, model: {small_cnn: {width: 4}}, target: {test_accuracy: 0.9}}
base: {epochs: 1, batch: 128, rate: {peak: 0.1}}
seeds: 40
"""


def trials(folder: Path, text: str = RECIPE) -> list[Trial]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return expand(load(path), fingerprint, "fp32")


def test_fifty_trials_leave_no_memory_behind(tmp_path: Path) -> None:
    """A warm gang that lost memory would end a long study: less than 0.2 MiB a trial, once the first few have warmed up."""
    held = []
    for trial in trials(tmp_path):
        worker = make_worker("solo", {}, "fp32", 0, 1, torch.device("cpu"))
        result = run_trial(worker, Assignment(trial, tmp_path / trial.id, tmp_path / "phases"))
        assert result["status"] == "done"
        held.append(psutil.Process().memory_info().rss / 2**20)
    assert (held[-1] - held[9]) / 30 < 0.2


def test_the_result_tells_what_a_reader_needs(tmp_path: Path) -> None:
    trial = trials(tmp_path)[0]
    worker = make_worker("solo", {}, "fp32", 0, 1, torch.device("cpu"))
    result = run_trial(worker, Assignment(trial, tmp_path / trial.id, tmp_path / "phases"))
    assert result["steps"] == 12 and result["examples"] == 12 * 128 and result["micro_batch"] == 128
    assert (result["workers"], result["roles"]) == (1, 1)
    (file,) = tmp_path.glob("phases/*/weights.safetensors")
    learnt = [v for name, v in load_file(file).items() if "running" not in name and v.ndim]
    assert result["parameters"] == sum(v.numel() for v in learnt)
    assert {"startup", "data", "train", "eval", "save"} == result["seconds"].keys()
    assert all(seconds >= 0 for seconds in result["seconds"].values())
    assert result["final"].keys() >= {"train_loss", "test_loss", "test_accuracy"} and not result["reused"]


def test_a_full_disk_costs_a_rank_its_log_and_nothing_else(tmp_path: Path) -> None:
    """Words that the disk does not take end no training, and hide no error of it."""
    log = tmp_path / "rank_0.log"
    log.symlink_to("/dev/full")
    with rank_log(log):
        print("a line", flush=True)
    with pytest.raises(ValueError, match="mine"), rank_log(log):
        raise ValueError("mine")
