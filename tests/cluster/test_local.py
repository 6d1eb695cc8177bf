"""The gang of one, and what it takes to import the layer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.local import LocalGang
from cluster.tasks import Done, Failed, Gang, Task
from strategies.contract import Worker
from tests.waiting import at_once


def describe(worker: Worker, argument: Any) -> tuple[Any, ...]:
    return argument, worker.rank, worker.size, torch.get_num_threads()


def fail(worker: Worker, argument: str) -> None:
    raise ValueError(f"{argument}\nsecond line")


def interrupt(worker: Worker, argument: Any) -> None:
    raise KeyboardInterrupt


def test_runs_task_after_task() -> None:
    gang: Gang = LocalGang()
    for argument in ("a", "b"):
        gang.start(Task(describe, argument, "ddp", {"find_unused_parameters": False}, threads=1))
        assert gang.poll(0) == Done((argument, 0, 1, 1))
    assert gang.poll(0) is None
    gang.close()


def test_an_exception_is_an_outcome_with_its_place() -> None:
    gang = LocalGang()
    gang.start(Task(fail, "bad label"))
    outcome = gang.poll(0)
    assert isinstance(outcome, Failed)
    assert (outcome.rank, outcome.kind, outcome.message) == (0, "ValueError", "bad label")
    assert outcome.where == f"{Path(__file__).name}:{fail.__code__.co_firstlineno + 1}"
    assert "second line" in outcome.traceback
    gang.start(Task(describe, 1))
    assert isinstance(gang.poll(0), Done)


def test_the_place_of_an_error_in_a_library_is_the_caller() -> None:
    gang = LocalGang()
    gang.start(
        Task(lambda worker, argument: torch.nn.functional.cross_entropy(torch.ones(2, 2), torch.ones(3).long()), 0)
    )
    outcome = gang.poll(0)
    assert isinstance(outcome, Failed) and outcome.where.startswith(f"{Path(__file__).name}:")


def test_ctrl_c_passes_through() -> None:
    gang = LocalGang()
    gang.start(Task(interrupt, None))
    with pytest.raises(KeyboardInterrupt):
        gang.poll(0)


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})


def test_neither_ray_nor_torch_is_imported_before_it_is_needed() -> None:
    modules = "cluster, cluster.tasks, cluster.engines, cluster.controller, cluster.policies, cluster.local"
    done = python(f"import sys, {modules}; print({{'ray', 'torch'}} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


def test_without_ray_the_error_names_the_extra() -> None:
    done = python("import sys; sys.modules['ray'] = None; import cluster.gang")
    assert done.stderr.strip().endswith('pip install "bigbatch[ray]", or set launcher: solo')


@pytest.mark.parametrize("address, words", [("127.0.0.1:1", "Connection refused"), ("127.0.0.1:x", "invalid literal")])
def test_a_wrong_ray_address_is_told_at_once(address: str, words: str) -> None:
    with at_once():
        done = python("from cluster.gang import connect; connect(2)", RAY_ADDRESS=address)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"cluster.tasks.ClusterError: no Ray cluster at {address}: ") and words in last
