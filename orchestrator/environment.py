"""What a study ran on: versions, hardware, source, command; without secrets, and without torch, ray or wandb."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

PACKAGES = ("torch", "ray", "numpy", "deepspeed", "wandb")
VARIABLES = re.compile(r"OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|BIGBATCH_\w+")
SECRET = re.compile(
    r"(^|[_\W])(api[_-]?key|access[_-]?key|private[_-]?key|secret|password|passwd|passphrase|credentials?|token|auth)$"
)
USERINFO = re.compile(r"(:/{1,2})[^/\s]+@")  # one slash: what a path makes of a URL
NAMED = re.compile(r"""(?<![\w.-])([\w.-]+)[\\"'\]]*\s*[:=][ \t]*""")
ENTRY = re.compile(r"\s*#|.*[:=]")  # what begins a comment or a key
SHORTEST = 8  # characters of a secret that is looked for wherever it may stand
HIDDEN = "***"


def describe() -> dict[str, Any]:
    """JSON data; what cannot be found out is left out or None. Takes some milliseconds, with a GPU up to 5 s."""
    return {
        "bigbatch": _version("bigbatch"),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "os": platform.platform(),
        "host": socket.gethostname(),
        "cpu": cpu_model(),
        "cores": {"physical": psutil.cpu_count(logical=False), "logical": psutil.cpu_count(), "usable": usable_cores()},
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
        "git": _git(),
        "command": redact_command(sys.argv),
        "variables": _variables(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1


def _cpuinfo(field: str) -> str:
    """The first processor's value of a field of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def cpu_model() -> str:
    """Name, family and model: virtual machines often name no more than the maker's line."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = _cpuinfo("cpu family"), _cpuinfo("model")
    return f"{name} (family {family}, model {model})" if family and model else name


def gpu_count() -> int:
    """NVIDIA GPUs of this machine that the torch that is installed can use and the recipe's user has not hidden."""
    if (_version("torch") or "").endswith("+cpu"):
        return 0
    there = len(list(Path("/dev").glob("nvidia[0-9]*")))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return there
    names = (name.strip() for name in shown.split(","))
    return min(there, len(list(takewhile(lambda name: name not in ("", "-1"), names))))  # as CUDA reads it


def gpus() -> list[str]:
    """Names of all NVIDIA GPUs, from the driver's files, else from nvidia-smi."""
    named = [_gpu_name(path) for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    return named or _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()


def _gpu_name(information: Path) -> str:
    found = re.search(r"^Model:\s*(.*)$", information.read_text(), re.MULTILINE)
    return found[1].strip() if found else "unknown"


def _output(*command: str) -> str:
    """What a program prints; empty if there is no such program, or if it fails or takes more than 5 s."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _git() -> dict[str, Any] | None:
    """The commit of the current directory, and whether tracked files differ from it."""
    commit = _output("git", "rev-parse", "HEAD")
    dirty = bool(_output("git", "status", "--porcelain", "--untracked-files=no"))
    return {"commit": commit, "dirty": dirty} if commit else None


def _variables() -> dict[str, str]:
    """An allow-list: what is not on it is never read."""
    found = {name: value for name, value in os.environ.items() if VARIABLES.fullmatch(name)}
    if address := os.environ.get("RAY_ADDRESS"):
        found["RAY_ADDRESS"] = urlsplit(address if "//" in address else f"//{address}").hostname or ""
    return redact(found)


def redact(value: Any) -> Any:
    """JSON data with *** for the values of keys that look like secrets, for the user part of URLs, and for the values of
    environment variables that are named like secrets."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if is_secret(str(key)) and item is not None else redact(item) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return _redact_string(value) if isinstance(value, str) else value


def _redact_string(text: str) -> str:
    for name, secret in os.environ.items():
        if len(secret) >= SHORTEST and secret in text and is_secret(name):
            text = text.replace(secret, HIDDEN)
    return USERINFO.sub(rf"\1{HIDDEN}@", text)


def redact_text(text: str) -> str:
    """As `redact`, for text that people write, also where it says `password: ...` or `token=...`, in a comment or not. The
    rest of such a line goes, and the lines that the value may go on in: a copy to be read is worth less than a secret."""
    return redact("".join(_without_secrets(text.splitlines(keepends=True))))


def _without_secrets(lines: list[str]) -> Iterator[str]:
    key: str | None = None  # what stands before the key whose value may go on
    for line in lines:
        if key is not None and _goes_on(line, key):
            continue
        shown = _hide(line)
        key = _leading(line, " \t#?-") if shown else None
        yield f"{shown}\n" if shown else line


def _goes_on(line: str, key: str) -> bool:
    """Whether a line may belong to the value of the last key: it is indented deeper, or begins nothing else."""
    if "#" in key:
        before = _leading(line, " \t#")
        return "#" in before and len(before) > len(key)
    return len(_leading(line, " \t")) > len(key) or not ENTRY.match(line)


def _leading(line: str, characters: str) -> str:
    return line[: len(line) - len(line.lstrip(characters))]


def _hide(text: str) -> str | None:
    """With *** for all that follows the first name of a secret; None if there is no such name."""
    ends = (named.end() for named in NAMED.finditer(text) if is_secret(named[1]))
    return next((text[:end] + HIDDEN for end in ends), None)


def is_secret(name: str) -> bool:
    """Whether a key or an option is named like a secret: `api_key`, `HF_TOKEN`, `--password`; not `num_tokens`."""
    return bool(SECRET.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def redact_command(arguments: list[str]) -> list[str]:
    """A command line with *** for what follows an option, an assignment or a key of a map that looks like a secret."""
    before = ["", *arguments]
    return [
        HIDDEN if option.startswith("-") and is_secret(option) else redact(_hide(argument) or argument)
        for option, argument in zip(before, arguments, strict=False)
    ]
