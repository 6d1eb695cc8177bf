"""The Ray cluster that gangs run on: the user's, or a private one for this process. Ray is imported through this module."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
from typing import Any

from cluster.tasks import CapacityError, ClusterError

OBJECT_STORE = 100 * 2**20  # bytes; tasks and results are small


def guard() -> None:
    """A token of our own for the cluster that we may start. Ray reads these variables when it is imported; left unset,
    it would write a token to the home directory that other clusters of the user would then ask for."""
    if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


guard()
try:
    import ray
except ModuleNotFoundError:
    raise ClusterError('several workers need Ray: pip install "bigbatch[ray]", or set launcher: solo') from None

own_directory: str | None = None  # of the private cluster


def connect(cpus: int = 1) -> None:
    """Connect to the cluster at RAY_ADDRESS; without one, start a private cluster on this machine with at least `cpus` CPUs.

    Call it on the main thread: the private cluster ends with the thread that started it. Raises ClusterError.
    """
    address = os.environ.get("RAY_ADDRESS")
    try:
        where = {"address": address} if address else private(cpus)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        disconnect()
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(f"no Ray cluster at {address or 'this machine'}: {line}") from None


def private(cpus: int) -> dict[str, Any]:
    """Settings of a cluster for this process alone: loopback, no dashboard, a directory of its own."""
    global own_directory
    own_directory = tempfile.mkdtemp(prefix="bigbatch-ray-", dir="/tmp")  # short: it holds unix sockets
    settings = {"address": "local", "num_cpus": max(os.cpu_count() or 1, cpus), "include_dashboard": False}
    return settings | {
        "object_store_memory": OBJECT_STORE,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": own_directory,
    }


def disconnect() -> None:
    """Leave the cluster; end it if it is ours."""
    global own_directory
    ray.shutdown()
    if own_directory:
        shutil.rmtree(own_directory, ignore_errors=True)
        own_directory = None


def capacity(workers: int, threads: int = 1, gpus: int = 0) -> int:
    """How many gangs the whole cluster holds side by side. Raises CapacityError if not even one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gangs = sum(room(node, threads, gpus) for node in nodes) // workers
    if not gangs:
        have = [f"{sum(node.get(kind, 0) for node in nodes):g} {kind}s" for kind in ("CPU", "GPU")[: 1 + bool(gpus)]]
        each = f"{threads} CPUs" + (f" + {gpus} GPUs" if gpus else "")
        raise CapacityError(f"no room for {workers} workers x {each}: {len(nodes)} nodes have {', '.join(have)} in all")
    return gangs


def room(node: dict[str, float], threads: int, gpus: int) -> int:
    """Workers that an empty node holds."""
    by_cpu = int(node.get("CPU", 0) // threads)
    return min(by_cpu, int(node.get("GPU", 0) // gpus)) if gpus else by_cpu
