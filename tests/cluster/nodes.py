"""Clusters of several raylets on this machine, of which some do not see a folder: a tmpfs lies over it there."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cluster.session  # noqa: F401 - before ray: it sets what Ray reads when it is imported

pytest.importorskip("ray", reason="Ray is not installed")
from ray.cluster_utils import Cluster

NEW_MOUNTS = 0x00020000  # CLONE_NEWNS


def elsewhere(hidden: Path, function: Callable[[], Any]) -> Any:
    """`function()` in a thread, whose child processes find `hidden` empty. OSError if this user may not hide anything."""
    outcome: list[Any] = []

    def body() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if libc.unshare(NEW_MOUNTS):
                raise OSError(ctypes.get_errno(), "unshare")
            subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)
            subprocess.run(["mount", "-t", "tmpfs", "none", str(hidden)], check=True, capture_output=True)
            outcome.append(function())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def require_mounts(folder: Path) -> None:
    """Skips the test where no file system can be hidden."""
    try:
        elsewhere(folder, lambda: None)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"this user cannot mount a file system of its own: {error}")


class Nodes:
    """A head without CPUs, which sees everything, and nodes that do not see `hidden`."""

    def __init__(self, hidden: Path, temporary: Path, head_cpus: int = 0):
        self.hidden, self.temporary = hidden, temporary
        args = {"num_cpus": head_cpus, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        self.cluster = Cluster(True, head_node_args={**args, "temp_dir": str(temporary)})
        self.cluster._shutdown_at_exit = False  # exit hooks are for the main thread; `nodes` shuts down
        self.address = self.cluster.address

    def add(self, cpus: int = 1) -> Any:
        args = {"num_cpus": cpus, "object_store_memory": 80 * 2**20}
        return elsewhere(self.hidden, lambda: self.cluster.add_node(**args))

    def remove(self, node: Any) -> None:
        """At once, as when a machine loses power."""
        self.cluster.remove_node(node, allow_graceful=False)

    def environment(self) -> dict[str, str]:
        """Of a driver."""
        return {**os.environ, "RAY_ADDRESS": self.address, "BIGBATCH_HOME": str(self.hidden / "home")}


@contextmanager
def nodes(hidden: Path, temporary: Path, head_cpus: int = 0) -> Iterator[Nodes]:
    require_mounts(hidden)
    made = Nodes(hidden, temporary, head_cpus)
    try:
        yield made
    finally:
        made.cluster.shutdown()
