"""Clusters of several raylets on this machine, of which some do not see a folder: a tmpfs lies over it there."""

from __future__ import annotations

import ctypes
import os
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
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
        (temporary / "ray").mkdir()  # Ray notes the address there, and does not make the folder
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TMPDIR", str(temporary))
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


# ------------------------------------------------------------------------------------------------- network namespaces

HEAD, OTHER = "10.213.77.1", "10.213.77.2"
RAY = [
    sys.executable,
    "-m",
    "ray.scripts.scripts",
    "start",
    "--block",
    "--num-cpus=1",
    "--object-store-memory=80000000",
]


@dataclass(frozen=True)
class Hosts:
    """Two nodes with a cable between them."""

    inside: list[str]  # what a driver's command on the first begins with
    environment: dict[str, str]  # of a driver
    cable: list[str]  # what a command on the cable's far end begins with

    def pull(self) -> None:
        subprocess.run([*self.cable, "down"], check=True)

    def plug(self) -> None:
        subprocess.run([*self.cable, "up"], check=True)


@contextmanager
def two_hosts(hidden: Path, temporary: Path) -> Iterator[Hosts]:
    """Nodes of a CPU each, with networks and addresses of their own; the second does not see `hidden`."""
    require_mounts(hidden)
    spaces = [f"bigbatch{os.getpid()}{side}" for side in "ab"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "token"}
    environment |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "BIGBATCH_HOME": str(hidden / "home")}
    inside = [["ip", "netns", "exec", space] for space in spaces]
    with ExitStack() as held:
        for space in spaces:
            _must("ip", "netns", "add", space)
            held.callback(subprocess.run, ["ip", "netns", "delete", space])
        cable = _connect(spaces)
        head = [*RAY, "--head", f"--node-ip-address={HEAD}", "--port=6399", f"--temp-dir={temporary}"]
        other = [*RAY, f"--address={HEAD}:6399", f"--node-ip-address={OTHER}"]
        hide = f"mount --make-rprivate / && mount -t tmpfs none {shlex.quote(str(hidden))} && exec {shlex.join(other)}"
        for command in (
            [*inside[0], *head, "--include-dashboard=false"],
            [*inside[1], "unshare", "-m", "sh", "-c", hide],
        ):
            process = subprocess.Popen(command, env=environment, stdout=-3, stderr=-3, start_new_session=True)
            held.callback(end, process)
            time.sleep(8)  # the second looks for the first
        yield Hosts(inside[0], environment | {"RAY_ADDRESS": f"{HEAD}:6399"}, cable)


def _connect(spaces: list[str]) -> list[str]:
    """-> how a command on the second end begins."""
    ends = [f"bb{os.getpid()}{side}" for side in "ab"]
    _must("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for space, cable, address in zip(spaces, ends, (HEAD, OTHER), strict=True):
        _must("ip", "link", "set", cable, "netns", space)
        _must("ip", "-n", space, "addr", "add", f"{address}/24", "dev", cable)
        for device in ("lo", cable):
            _must("ip", "-n", space, "link", "set", device, "up")
    return ["ip", "-n", spaces[1], "link", "set", ends[1]]


def _must(*command: str) -> None:
    """Skips the test where this cannot be done."""
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no network namespaces here: {error}")


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
