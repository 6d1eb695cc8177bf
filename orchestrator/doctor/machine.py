"""The machine: names and ports that workers meet by, disks, locks that a killed build left, CPU threads."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

from orchestrator.doctor.finding import Finding, bad, ok, warn
from orchestrator.environment import usable_cores

PORTS = 64  # about what a study with a private Ray cluster takes
LEAST_DISK, ENOUGH_DISK = 2**30, 10 * 2**30  # bytes
STALE = 600.0  # seconds: no build of an extension takes longer without a sign of life


def hostname() -> Finding:
    name = socket.gethostname()
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        said = f"{name} does not resolve ({error}): fine on one machine, but other nodes cannot find this one"
        return warn("hostname", said, f"add a line 'ADDRESS {name}' to /etc/hosts")
    return ok("hostname", f"{name} is {', '.join(sorted(addresses))}")


def interfaces() -> Finding:
    """The network interfaces that the environment names for gloo and NCCL."""
    there = set(psutil.net_if_addrs())
    asked = os.environ.get("GLOO_SOCKET_IFNAME", "")
    unknown = [name for name in asked.split(",") if name and name not in there]
    if unknown:
        said = f"GLOO_SOCKET_IFNAME={asked}: no interface {', '.join(unknown)} (gloo knows no patterns)"
        return bad("interfaces", said, f"unset GLOO_SOCKET_IFNAME, or name one of {', '.join(sorted(there))}")
    return ok("interfaces", ", ".join(sorted(there)) + (f"; gloo uses {asked}" if asked else ""))


def ports() -> Finding:
    """Free ports on loopback, and a connection through one of them."""
    try:
        with ExitStack() as stack:
            servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(PORTS)]
            socket.create_connection(servers[0].getsockname(), timeout=1).close()
    except OSError as error:
        return bad("ports", f"127.0.0.1: {error}", "see `ip addr show lo`, `ulimit -n` and the firewall")
    return ok("ports", f"{PORTS} free on 127.0.0.1")


def disk(name: str, folder: Path) -> Finding:
    """Space and the right to write, where `folder` is or would be made."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    said = f"{folder}: {free / 2**30:.1f} GiB free"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return bad(
            name, f"{there} cannot be written to", "choose another folder: --output, or BIGBATCH_HOME for the cache"
        )
    if free < LEAST_DISK:
        return bad(name, said, "make room, or choose another folder")
    return warn(name, said, "checkpoints of large networks may not fit") if free < ENOUGH_DISK else ok(name, said)


def locks() -> Finding:
    """Locks of torch's extension builds: one that a killed build left makes all later ones wait without end."""
    name, root, now = "extension locks", extensions(), time.time()
    stale = sorted(path for path in root.glob("**/lock") if now - path.stat().st_mtime > STALE)
    if stale:
        said = f"{len(stale)} left by builds that were killed: whatever needs these extensions hangs"
        return bad(name, said, "if nothing is being built: rm " + " ".join(shlex.quote(str(path)) for path in stale))
    return ok(name, f"none is old in {root}")


def extensions() -> Path:
    """Where torch builds its extensions."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions").expanduser()


def threads() -> Finding:
    """The recipe's `threads` decides for workers; OMP_NUM_THREADS for all else."""
    cores, asked = usable_cores(), os.environ.get("OMP_NUM_THREADS")
    if asked is None:
        return ok("threads", f"{cores} cores; OMP_NUM_THREADS is not set")
    if not asked.isdecimal() or int(asked) == 0:
        return warn("threads", f"OMP_NUM_THREADS={asked}: expected a number of threads", "unset OMP_NUM_THREADS")
    if int(asked) > cores:
        return warn("threads", f"OMP_NUM_THREADS={asked}, but {cores} cores", f"export OMP_NUM_THREADS={cores}")
    return ok("threads", f"{cores} cores, OMP_NUM_THREADS={asked}")
