"""`bigbatch doctor`: checks of this machine and its settings, each a small function that changes nothing.

Checks run side by side in threads that nobody waits for longer than LIMIT, so that a name server or a disk that does
not answer costs its own finding and no other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.doctor import data_sets, machine, ray_cluster, software
from orchestrator.doctor.finding import BAD, OK, WARN, Finding, warn
from orchestrator.files import printable
from orchestrator.workloads.files import home

__all__ = ["BAD", "OK", "WARN", "Finding", "as_text", "checks", "diagnose"]

LIMIT = software.TORCH_LIMIT + 2.0  # seconds, for all checks together
Check = Callable[[], Finding]


def checks(runs: Path) -> dict[str, Check]:
    """All checks by name, in the order in which they are told."""
    torch = software.Torch()
    return {
        "python": software.python,
        "bigbatch": software.bigbatch,
        "packages": software.packages,
        "torch": lambda: software.devices(torch),
        "communication": lambda: software.communication(torch),
        "deepspeed": software.deepspeed,
        "ray": ray_cluster.version,
        "ray authentication": ray_cluster.authentication,
        "ray dashboard": ray_cluster.dashboard,
        "wandb": software.wandb,
        "hostname": machine.hostname,
        "interfaces": machine.interfaces,
        "ports": machine.ports,
        "disk: runs": lambda: machine.disk("disk: runs", runs),
        "disk: cache": lambda: machine.disk("disk: cache", home()),
        "extension locks": machine.locks,
        "threads": machine.threads,
        "data": data_sets.data,
    }


def diagnose(runs: Path, limit: float = LIMIT) -> list[Finding]:
    """The findings of all checks, after at most `limit` seconds."""
    return examine(checks(runs), limit)


def examine(checks: dict[str, Check], limit: float) -> list[Finding]:
    """One finding for each check, also where it raised or did not come back."""
    found: dict[str, Finding] = {}

    def work(name: str, check: Check) -> None:
        try:
            found[name] = check()
        except Exception as error:
            found[name] = warn(name, f"could not be checked: {type(error).__name__}: {error}", "please report this")

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + limit
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = f"no answer within {limit:g} s"
    return [found.get(name) or warn(name, late, "look at what this machine waits for") for name in checks]


def as_text(findings: Sequence[Finding]) -> str:
    """A line for each finding, and its remedy below."""
    width = max(len(f.name) for f in findings)
    lines = []
    for f in findings:
        lines.append(f"{f.status:4}  {f.name:{width}}  {printable(f.message)}")
        if f.remedy:
            lines.append(" " * (width + 8) + f"-> {printable(f.remedy)}")
    return "\n".join(lines)
