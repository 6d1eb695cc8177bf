"""Run a function on several worker processes that hold one gloo process group, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

HOST = "127.0.0.1"
LIMIT = 60.0  # seconds


def run_workers(function: Callable[..., Any], size: int, *args: Any, limit: float = LIMIT, **options: Any) -> list[Any]:
    """[function(worker, *args) of each rank], under engine ddp with `options`. `function` is defined at module level.

    Raises AssertionError with the traceback of the first rank that raised, or naming the ranks silent for `limit` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cluster.engines.ddp", "torch._dynamo"])  # imported once for all runs
    store = TCPStore(HOST, 0, size, True, wait_for_workers=False)
    reports = context.Queue()
    job = (store.port, function, args, options)
    processes = [context.Process(target=_rank, args=(reports, rank, size, *job), daemon=True) for rank in range(size)]
    try:
        for process in processes:
            process.start()
        return _results(reports, size, limit)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _results(reports: Any, size: int, limit: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < size:
        try:
            rank, error, value = pickle.loads(reports.get(timeout=limit))
        except queue.Empty:
            silent = sorted(set(range(size)) - set(results))
            raise AssertionError(f"no report from ranks {silent} in {limit:g} s") from None
        assert error is None, f"rank {rank} raised:\n{error}"
        results[rank] = value
    return [results[rank] for rank in range(size)]


def _rank(
    reports: Any, rank: int, size: int, port: int, function: Callable[..., Any], args: Any, options: dict[str, Any]
) -> None:
    import torch
    from torch import distributed as dist

    from cluster.engines import make_worker

    try:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = dist.TCPStore(HOST, port, size, False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT))
        worker = make_worker("ddp", options, "fp64", rank, size, torch.device("cpu"))
        report: tuple[int, str | None, Any] = (rank, None, function(worker, *args))
    except Exception:
        report = (rank, traceback.format_exc(), None)
    reports.put(pickle.dumps(report))  # as bytes: tensors would go through shared memory of a process that ends
