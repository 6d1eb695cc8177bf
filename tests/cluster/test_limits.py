"""Who waits for a worker that does not get on waits no longer than the gang's time limit, in whatever process group."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed as dist

from tests.workers import run_workers

SHORT = timedelta(seconds=0.5)


def wait_in_vain(worker: Any, _: None = None) -> str:
    """Of three, 0 and 1 have a group; 1 stays in it, but takes no part. -> what 0 is told."""
    dist.distributed_c10d._set_pg_timeout(SHORT)
    among = (0, 1)
    if worker.rank in among:
        worker.broadcast(torch.zeros(1), 0, among).wait()
    if worker.rank == 0:
        with pytest.raises(RuntimeError, match="Timed out waiting 500ms") as told:
            worker.broadcast(torch.zeros(1), 1, among).wait()
        return str(told.value)
    time.sleep(3 * SHORT.total_seconds())
    return ""


def test_a_group_of_some_workers_waits_as_long_as_that_of_all() -> None:
    told, *_ = run_workers(wait_in_vain, 3)
    assert "gloo" in told
