"""What a gang is given and what it hands back: tasks, their outcomes, and the protocol of a gang. No torch, no ray."""

from __future__ import annotations

import re
import socket
import sysconfig
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from strategies.contract import Worker

Precision: TypeAlias = Literal["fp32", "bf16", "fp64"]


class ClusterError(RuntimeError):
    """What stands between a user and a running gang, in one line."""


class CapacityError(ClusterError):
    """A gang that the cluster can never hold."""


@dataclass(frozen=True)
class Files:
    """What a task finds and leaves on disk: absolute paths of folders on the driver's node. Nodes that do not see them
    work on copies (see `cluster.mirror`), and what ranks write there comes back."""

    writes: tuple[Path, ...] = ()
    reads: tuple[Path, ...] = ()  # in `writes`: what rank 0 needs of them
    constant: tuple[Path, ...] = ()  # never change once they are there: sent to a node once, if it has no such folder


@dataclass(frozen=True)
class Task:
    """A function that every rank of a gang calls as `function(worker, argument)`; rank 0's return value is the result.

    Both must pickle: a module-level function, and data that is small next to a network.
    """

    function: Callable[[Worker, Any], Any]
    argument: Any
    engine: str = "solo"  # a key of cluster.engines.OFFERS
    options: Mapping[str, Any] = field(default_factory=dict)  # of the engine, e.g. {"find_unused_parameters": False}
    precision: Precision = "fp32"
    threads: int = 1  # CPU threads per rank
    files: Files = Files()


@dataclass(frozen=True)
class Done:
    value: Any


# Errors that a rank gets because another one has gone, or the network has: the effect of a loss, never its cause.
PEER_KINDS = {"ConnectionError", "ConnectionResetError", "ConnectionRefusedError", "BrokenPipeError"}
PEER_KINDS |= {"DistBackendError", "DistNetworkError", "DistStoreError"}
PEER_WORDS = re.compile(r"gloo|NCCL|connection (closed|reset|refused)|socket timeout", re.IGNORECASE)
MEMORY_KINDS = {"OutOfMemoryError", "MemoryError"}
MEMORY_WORDS = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class Failed:
    """The function raised on one rank."""

    rank: int
    host: str
    kind: str  # class name of the exception
    message: str  # first line of what it says
    where: str  # "file.py:123"
    traceback: str
    time: float = 0.0  # unix seconds

    @property
    def lost_peer(self) -> bool:
        """Whether this rank failed because it could no longer reach another one."""
        return self.kind in PEER_KINDS or (self.kind == "RuntimeError" and bool(PEER_WORDS.search(self.message)))

    @property
    def out_of_memory(self) -> bool:
        return self.kind in MEMORY_KINDS or (self.kind == "RuntimeError" and bool(MEMORY_WORDS.search(self.message)))


@dataclass(frozen=True)
class Lost:
    """A rank's process died, or gave no sign of life for too long."""

    rank: int
    reason: str
    preempted: bool = False  # taken away by the cluster on purpose


Outcome: TypeAlias = Done | Failed | Lost


class Gang(Protocol):
    """Workers that hold one process group and run task after task. After `Failed` or `Lost` it is only good to close."""

    size: int
    name: str

    @property
    def waits(self) -> bool:
        """Whether the cluster has had no room for it for some seconds, and still has none."""

    def start(self, task: Task) -> None:
        """Run a task on every rank. One at a time: the outcome of the one before must have been polled."""

    def poll(self, timeout: float) -> Outcome | None:
        """The outcome of the task, or None if there is none within `timeout` seconds."""

    def close(self) -> None:
        """End the workers, whatever they are doing. May be called again."""


def attempt(rank: int, function: Callable[[], Any]) -> Done | Failed:
    """What came of `function()`."""
    try:
        return Done(function())
    except Exception as error:
        return failure(rank, socket.gethostname(), error)


def failure(rank: int, host: str, error: BaseException) -> Failed:
    """`error` as an outcome: plain text, so that it crosses processes whatever the exception holds."""
    lines = str(error).strip().splitlines()
    text = "".join(traceback.format_exception(error))
    return Failed(rank, host, type(error).__name__, lines[0] if lines else "", place(error), text, time.time())


def root_cause(failures: list[Failed]) -> Failed:
    """The earliest error that is no mere effect of a lost peer, if there is one."""
    return min(failures, key=lambda failed: (failed.lost_peer, failed.time))


LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))


def place(error: BaseException) -> str:
    """The innermost line outside installed packages, where there is one, as "file.py:123"."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*LIBRARIES, "<"))] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
