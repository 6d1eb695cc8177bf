"""What the benchmarks share: interleaved repeats, medians with their range, tables, JSON, child processes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from orchestrator.environment import describe

REPOSITORY = Path(__file__).parent.parent
Measure = Callable[[], Sequence[Any]]


class Skipped(Exception):
    """A contender that cannot be measured here. str() is why."""


def require(*packages: str, how: str = "pip install -e '.[bench]'") -> None:
    """Raises Skipped if a package is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{', '.join(missing)} not installed: {how}")


def interleave(contenders: Mapping[str, Measure], repeats: int) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """-> samples, and reasons of the skipped, by contender. Each repeat passes through all: what drifts, drifts for all."""
    samples: dict[str, list[Any]] = {name: [] for name in contenders}
    skipped: dict[str, str] = {}
    for repeat in range(repeats):
        for name, measure in contenders.items():
            if name not in skipped:
                print(f"repeat {repeat + 1} of {repeats}: {name}", file=sys.stderr)
                try:
                    samples[name] += measure()
                except Skipped as why:
                    skipped[name] = str(why)
    return {name: found for name, found in samples.items() if name not in skipped}, skipped


def spread(samples: Sequence[float], digits: int = 3) -> str:
    """Median, and the range behind it."""
    low, middle, high = (short(value, digits) for value in (min(samples), statistics.median(samples), max(samples)))
    return f"{middle} ({low} - {high})"


def short(value: float, digits: int = 3) -> str:
    """Rounded to so many digits, without an exponent."""
    return f"{float(f'{value:.{digits}g}'):,.10g}"


def run(command: Sequence[str], timeout: float, **variables: str) -> str:
    """What a command prints; it and its children are ended after `timeout` seconds. Raises Skipped if it fails."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=os.environ | variables, start_new_session=True, **options
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Skipped(f"no end within {timeout:g} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise Skipped(f"exit code {process.returncode}: {cause(err or out)}")
    return out


def cause(text: str) -> str:
    """The line that names the first error, else the last line."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
    return next(
        (line for line in lines if re.match(r"(\[rank\d\]: )?[\w.]+(Error|Exception|Interrupt)\b", line)), lines[-1]
    )


def python(module: str, *arguments: str, workers: int = 1) -> list[str]:
    """The command that runs a module of ours, by torchrun if there are several workers."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), "-m"] if workers > 1 else []
    return [sys.executable, "-m", *launcher, module, *arguments]


def bigbatch(recipe: Mapping[str, Any], timeout: float) -> Path:
    """Run a recipe as users do, in a folder of its own; -> the study's directory."""
    folder = Path(tempfile.mkdtemp())
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    command = [sys.executable, "-m", "orchestrator", "run", str(folder / "recipe.yaml"), "--output", str(folder)]
    run(command, timeout)
    return folder / str(recipe["study"])


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for all temporary files of this process and its children, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="bigbatch-benchmark-") as folder:
        os.environ["TMPDIR"], tempfile.tempdir = folder, folder
        yield Path(folder)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arguments(about: str, repeats: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="passes through all contenders")
    parser.add_argument("--quick", action="store_true", help="one tiny repeat: shows that it works, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples, with the machine and versions")
    return parser


def tell(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], skipped: Mapping[str, str]) -> None:
    print(f"\n{title}\n\n{table(head, rows)}")
    for name, why in skipped.items():
        print(f"skipped: {name}: {why}")


def save(path: Path | None, results: Any) -> None:
    if path:
        path.write_text(
            json.dumps({"date": str(date.today()), "environment": describe(), "results": results}, indent=1)
        )


def machine() -> str:
    """One line: what the figures hold for."""
    facts = describe()
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    return f"{date.today()}, {facts['cpu']}, {facts['cores']['usable']} cores; Python {facts['python']}, {versions}"
