"""Studies as Ray jobs: what a working directory would ship, the submission, the log, the end. Ray is imported when called."""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import authentication
from cluster.tasks import ClusterError

UPLOAD_LIMIT = 100 * 2**20  # bytes of one request to the Jobs API
ZIP_HEADERS = 150  # bytes per file, about: Ray's package is a zip file without compression
KNOCK_LIMIT = 5.0  # seconds
PATIENCE = 60.0  # seconds that a dashboard may be away while a job is followed
POLL = 1.0  # seconds
NO_AGENT = "No available agent"  # what a dashboard says that has no agent to hand the job to
NO_AGENT_YET = 30.0  # seconds: a head that has just started has none yet
START_AGENT = (
    "this Ray has no agent that starts jobs: another Ray on its host may hold the agent's port, 52365; "
    "stop that one, or start this one with `ray start --head --dashboard-agent-listen-port=PORT`"
)
CHATTY = (  # loggers of the client
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True)
class Ended:
    """What became of a job."""

    status: str  # SUCCEEDED, FAILED or STOPPED
    exit_code: int | None  # of its driver; -9 where signal 9 killed it, None where it was stopped or never started
    message: str


def connect(address: str) -> Any:
    """A client of the Ray dashboard at `address`, HOST:PORT or a URL. Raises ClusterError, within some 10 s."""
    url = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
    if not url.startswith(("http://", "https://")):
        raise ClusterError(f"{address}: expected the address of a Ray dashboard, as http://HOST:8265")
    knock(url)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray would take these for the address that it was given
        os.environ.pop(name, None)
    with told(url):
        from ray.job_submission import JobSubmissionClient

        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        return JobSubmissionClient(url)


def knock(url: str) -> None:
    """Raises ClusterError if nobody answers in time: Ray's client would wait without end."""
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=KNOCK_LIMIT).close()
    except urllib.error.HTTPError:
        pass  # somebody is there; what the answer means is for Ray's client to say
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ClusterError(f"no Ray dashboard at {url}: {getattr(error, 'reason', error)}") from None


@contextmanager
def told(url: str) -> Iterator[None]:
    """Failures of Ray's client as a ClusterError of one line."""
    try:
        from ray.exceptions import AuthenticationError, RayError
        from ray.job_submission import JobSubmissionClient  # noqa: F401 - it needs more than plain Ray
    except ImportError:
        raise ClusterError('Ray jobs need its Jobs client: pip install "ray[default]"') from None
    try:
        yield
    except AuthenticationError:
        raise ClusterError(f"{url} asks for a token: {authentication.remedy()}") from None
    except (RayError, RuntimeError, ValueError, OSError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(f"{url}: {START_AGENT if NO_AGENT in line else line}") from None


def shipped(directory: Path, excludes: Sequence[str]) -> dict[str, int]:
    """Bytes of each file that Ray would upload, by its path in `directory`: not what .gitignore and .rayignore name."""
    with told(str(directory)):
        from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

        root, sizes = directory.absolute(), {}

        def note(path: Path) -> None:
            if path.is_file():
                sizes[str(path.relative_to(root))] = path.stat().st_size

        ignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
        _dir_travel(root, [_get_excludes(root, list(excludes))], note, ignore, logging.getLogger("bigbatch.quiet"))
        return sizes


def package_size(sizes: Mapping[str, int]) -> int:
    """Bytes of the upload of these files."""
    return sum(size + ZIP_HEADERS + 2 * len(path) for path, size in sizes.items())


def submit(client: Any, entrypoint: str, runtime_env: dict[str, Any]) -> str:
    """Uploads the working directory and starts the job, once the head is ready for it; its id. Raises ClusterError."""
    limit = time.monotonic() + NO_AGENT_YET
    with told(client.get_address()):
        while True:
            try:
                return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
            except RuntimeError as error:
                if NO_AGENT not in str(error) or time.monotonic() > limit:
                    raise
            time.sleep(POLL)


def follow(client: Any, job: str, write: Callable[[str], object]) -> Ended:
    """Hands the job's log to `write` as it comes, until the job ends. Raises ClusterError if the dashboard stays away."""
    with told(client.get_address()):
        from aiohttp import ClientError

        try:
            asyncio.run(_tail(client, job, write))
        except (RuntimeError, OSError, ClientError) as error:
            write(f"\n(the log broke off: {error}; the job goes on)\n")
        info = _wait(client, job)
        return Ended(str(info.status.value), info.driver_exit_code, info.message or "")


async def _tail(client: Any, job: str, write: Callable[[str], object]) -> None:
    async for text in client.tail_job_logs(job):
        write(text)


def _wait(client: Any, job: str) -> Any:
    """The job's details once it has ended."""
    seen = time.monotonic()
    while True:
        try:
            info = client.get_job_info(job)
            seen = time.monotonic()
            if info.status.is_terminal():
                return info
        except (RuntimeError, OSError):
            if time.monotonic() - seen > PATIENCE:
                raise
        time.sleep(POLL)
