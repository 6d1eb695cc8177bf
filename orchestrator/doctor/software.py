"""What is installed: Python, packages and their tested versions, torch and its devices, W&B."""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import platform
import shutil
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.doctor.finding import Finding, bad, ok, warn
from orchestrator.environment import gpus

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
OLDEST_PYTHON = (3, 11)
TORCH_LIMIT = 30.0  # seconds; on a network file system the first import is slow
PROBE = """
import json, torch
from torch import distributed as d
cuda = torch.cuda.is_available()
there = d.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "gloo": there and d.is_gloo_available(),
    "nccl": there and d.is_nccl_available(),
}))
"""


def python() -> Finding:
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        return bad("python", f"{version}: too old", "use Python 3.11 or newer")
    return ok("python", f"{version}, {sys.executable}")


def bigbatch() -> Finding:
    try:
        return ok("bigbatch", f"{metadata.version('bigbatch')}, {Path(__file__).parents[2]}")
    except metadata.PackageNotFoundError:
        return warn("bigbatch", "runs from a folder and is not installed", "pip install -e . in its checkout")


def packages(constraints: Path = CONSTRAINTS) -> Finding:
    """Installed versions against those that this release was tested with."""
    tested = tested_versions(constraints)
    found = {name: installed(name) for name in tested}
    said = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())
    other = [n for n, version in found.items() if version and version.split("+")[0] != tested[n]]
    if other:
        pins = " ".join(f"{name}=={tested[name]}" for name in other)
        return warn("packages", f"{said}; this release was tested with {pins}", f"pip install {pins}")
    return ok("packages", said or "a release without its list of tested versions")


def tested_versions(constraints: Path) -> dict[str, str]:
    """Of each pinned package; empty for an installation that came without the file."""
    lines = constraints.read_text().splitlines() if constraints.exists() else []
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Torch:
    """What torch says about itself, or what went wrong: asked once, in a process of its own, which may hang or crash."""

    def __init__(self, limit: float = TORCH_LIMIT):
        self.limit = limit
        self._asking = threading.Lock()
        self._told: dict[str, Any] | str | None = None

    def told(self) -> dict[str, Any] | str:
        with self._asking:
            if self._told is None:
                self._told = probe(self.limit)
            return self._told


def probe(limit: float) -> dict[str, Any] | str:
    try:
        done = subprocess.run([sys.executable, "-P", "-c", PROBE], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"import torch did not end within {limit:g} s"
    if done.returncode < 0:
        return f"import torch was killed by signal {-done.returncode}"
    if done.returncode:
        return f"import torch failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def devices(torch: Torch) -> Finding:
    told = torch.told()
    if isinstance(told, str):
        return bad("torch", told, "install torch anew: pip install --force-reinstall torch")
    if not told["devices"] and (there := gpus()):
        remedy = f"install a build of torch for this driver (torch.version.cuda is {told['cuda']}); see nvidia-smi"
        return warn("torch", f"{told['version']} cannot use {', '.join(there)}", remedy)
    return ok("torch", f"{told['version']}, {', '.join(told['devices']) or 'CPU only'}")


def communication(torch: Torch) -> Finding:
    """The libraries that workers talk by: gloo on CPUs, NCCL on GPUs."""
    told = torch.told()
    if isinstance(told, str):
        return bad("communication", "unknown without torch", "mend torch first")
    if not told["gloo"]:
        return bad("communication", "torch was built without gloo: no two workers on CPUs", "install a build with it")
    if len(told["devices"]) > 1 and not told["nccl"]:
        return bad("communication", "torch was built without NCCL: no two workers on GPUs", "install a build with it")
    return ok("communication", "gloo, NCCL" if told["nccl"] else "gloo")


def deepspeed() -> Finding:
    """Its ops are built when first used, which needs a compiler; the default settings need none of them."""
    version = installed("deepspeed")
    if version is None:
        return ok("deepspeed", "not installed, and needed for `engine: deepspeed` only")
    tools = [name for name in ("c++", "ninja", "nvcc") if shutil.which(name)]
    return ok("deepspeed", f"{version}; to build ops: {', '.join(tools) or 'no compiler'} (the defaults need none)")


def wandb() -> Finding:
    """Where runs go, and whether there is a key; the key is not read out."""
    mode = os.environ.get("WANDB_MODE", "")
    if os.environ.get("BIGBATCH_NO_TRACKING") or mode == "disabled":
        return ok("wandb", "switched off by the environment")
    if importlib.util.find_spec("wandb") is None:
        return ok("wandb", "not installed: results are in files only")
    key = has_key()
    said = f"WANDB_MODE={mode}, " if mode else "the recipe says where runs go, "
    if mode == "online" and not key:
        return warn("wandb", f"{said}no API key: runs are kept offline", "wandb login, or set WANDB_API_KEY")
    return ok("wandb", said + ("an API key is set" if key else "no API key: offline only"))


def has_key() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return (
            bool(os.environ.get("WANDB_API_KEY"))
            or netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
        )
    except (OSError, netrc.NetrcParseError):
        return False
