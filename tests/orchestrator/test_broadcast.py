"""What rank 0 reads reaches the others as it is, and a trial resumes on ranks that see no file of it."""

from __future__ import annotations

import math
from typing import Any

import torch

from orchestrator.broadcast import from_rank_0
from strategies.contract import Worker
from tests.workers import run_workers

VALUE: dict[str, Any] = {
    "weights": {"a": torch.randn(3, 2, dtype=torch.float64), "n": torch.tensor(7), "none": torch.zeros(0)},
    "state": {0: [1.5, None, math.inf], "pair": (True, "x")},
}


def receive(worker: Worker, value: Any) -> Any:
    def read() -> Any:
        assert worker.rank == 0
        return value

    return from_rank_0(worker, read)


def test_all_ranks_get_what_rank_0_reads() -> None:
    for got in run_workers(receive, 2, VALUE):
        assert got["state"] == VALUE["state"]
        assert got["weights"].keys() == VALUE["weights"].keys()
        assert all(
            torch.equal(got["weights"][k], v) and got["weights"][k].dtype == v.dtype
            for k, v in VALUE["weights"].items()
        )


def test_nothing_is_nothing_on_all_ranks() -> None:
    assert run_workers(receive, 2, None) == [None, None]
