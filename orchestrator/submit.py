"""`bigbatch submit`: a recipe becomes a Ray job, after all that can be checked before the upload was checked."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from cluster import jobs
from cluster.tasks import ClusterError
from orchestrator.recipe import Recipe
from orchestrator.signals import TERMINATED
from orchestrator.terminal import say, shown

EXCLUDES = (".git", ".venv", "venv", "__pycache__")  # wherever they are in the working directory
GRACE = 60  # seconds that a stopped job has to save and end; Ray gives it 3 otherwise
LARGEST = 5  # paths that are named where there is too much to upload
INTERRUPTED = 130
COMMAND = "$(command -v bigbatch >/dev/null && echo bigbatch || echo python -m orchestrator)"


def submit(
    recipe: Recipe, path: Path, address: str, directory: Path, output: str, options: Sequence[str], wait: bool
) -> int:
    """Ships `directory`, starts `bigbatch run` on the recipe in it, and with `wait` sees it through.

    `output` is the cluster's folder of studies, `options` go to `bigbatch run` as they are. The exit code is 0 once
    the job is on its way; with `wait` it is the study's own. Raises ClusterError for what stands in the way.
    """
    inside, excludes = relative(path, directory), [*EXCLUDES, *outputs(directory)]
    command = entrypoint(inside, output, options)
    check_shipment(recipe, inside, directory, jobs.shipped(directory, excludes))
    client = jobs.connect(address)
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(GRACE)}
    job = jobs.submit(client, command, {"working_dir": str(directory), "excludes": excludes, "env_vars": environment})
    print(job, flush=True)
    hints = "; ".join(f"{word} ray job {verb} --address {client.get_address()} {job}" for word, verb in HOW.items())
    if not wait:
        say(hints)
        return 0
    try:
        return exit_code(jobs.follow(client, job, echo))
    except KeyboardInterrupt:
        say(f"the job goes on; {hints}")
        return INTERRUPTED


HOW = {"follow it:": "logs --follow", "stop it:": "stop"}


def echo(log: str) -> None:
    """A piece of the job's log, without characters that steer a terminal."""
    print(shown(log), end="", flush=True)


def relative(path: Path, directory: Path) -> PurePosixPath:
    """The recipe's path in the working directory. Raises ClusterError if it lies elsewhere."""
    if not directory.is_dir():
        raise ClusterError(f"{directory}: no such directory; --working-dir is the folder that goes to the cluster")
    try:
        return PurePosixPath(path.resolve().relative_to(directory.resolve()))
    except ValueError:
        where = directory.resolve()
        raise ClusterError(f"{path} is not in the working directory {where}: give --working-dir") from None


def outputs(directory: Path) -> list[str]:
    """The pattern of the local folder of studies, where that lies in the working directory: it is not shipped."""
    runs = Path(os.environ.get("BIGBATCH_RUNS") or directory / "runs").resolve()
    if not runs.is_dir() or directory.resolve() not in runs.parents:
        return []
    say(f"{runs} lies in the working directory: it is not shipped")
    return [f"/{runs.relative_to(directory.resolve())}"]


def entrypoint(recipe: PurePosixPath, output: str, options: Sequence[str]) -> str:
    """The job's shell command. `exec`, so that a signal and an exit code are the study's own and not a shell's."""
    home = "~/" if output.startswith("~/") else ""
    if not home and not output.startswith("/"):
        raise ClusterError(
            f"--output {output}: a job's working directory goes with the job; expected /FOLDER or ~/FOLDER on the cluster"
        )
    words = " ".join(map(shlex.quote, ["run", str(recipe), *options]))
    return f"exec {COMMAND} {words} --output {home}{shlex.quote(output.removeprefix(home))}"


def check_shipment(recipe: Recipe, inside: PurePosixPath, directory: Path, sizes: Mapping[str, int]) -> None:
    """Says what is shipped. Raises ClusterError if it is too much, or lacks the recipe."""
    total = jobs.package_size(sizes)
    if total > jobs.UPLOAD_LIMIT:
        raise ClusterError(
            f"{directory.resolve()}: {mib(total)} to upload, Ray's Jobs API takes {mib(jobs.UPLOAD_LIMIT)}; largest: "
            f"{largest(sizes)}; name in .rayignore what the study does not need, or give another --working-dir"
        )
    if str(inside) not in sizes:
        raise ClusterError(f"{inside} would not be shipped: .gitignore or .rayignore names it")
    say(f"shipping {len(sizes)} files, {mib(total)}, from {directory.resolve()}")
    for study in (PurePosixPath(path).parent for path in sizes if PurePosixPath(path).name == "journal.jsonl"):
        say(f"warning: the study in {study} is shipped too; name it in .rayignore")
    missing = data_left_out(recipe, directory, sizes)
    if missing:
        say(f"warning: the recipe's data {missing} are not shipped: .gitignore or .rayignore names them")


def data_left_out(recipe: Recipe, directory: Path, sizes: Mapping[str, int]) -> str | None:
    """The recipe's own data, where they lie in the working directory and stay behind."""
    path = getattr(recipe.workload.data.options, "path", None)
    if path is None or Path(path).is_absolute() or not (directory / path).exists():
        return None
    name = os.path.normpath(path)
    return None if any(file == name or file.startswith(f"{name}/") for file in sizes) else path


def largest(sizes: Mapping[str, int]) -> str:
    """The largest files; the largest folders where it is many small files that add up."""
    files, folders = Counter(sizes), Counter[str]()
    for path, size in sizes.items():
        folders[path.split("/")[0] + "/" * ("/" in path)] += size
    top = files.most_common(LARGEST)
    many = sum(size for _, size in top) < files.total() / 2
    return ", ".join(f"{path} ({mib(size)})" for path, size in (folders.most_common(LARGEST) if many else top))


def mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def exit_code(end: jobs.Ended) -> int:
    """The study's exit code: 75 where the job was stopped, 128 + n where signal n killed it, as a shell has it."""
    if end.status == "STOPPED":
        say("the job was stopped; the same command again goes on")
        return TERMINATED
    if end.exit_code is None:
        if end.status != "SUCCEEDED":
            say(f"the job failed: {end.message}")
        return int(end.status != "SUCCEEDED")
    return end.exit_code if end.exit_code >= 0 else 128 - end.exit_code
