"""`bigbatch submit` as typed: what is refused before the upload, and, on a real Ray head, what comes back of a job."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray.job_submission", reason="Ray's Jobs client is not installed")

from cluster import authentication, jobs
from orchestrator import submit
from tests.waiting import at_once

RECIPE = """
study: NAME
workload: {data: digits, model: {mlp: {width: 16, depth: 1}}}
base: {epochs: EPOCHS, batch: 64, rate: {peak: 0.05}}
"""
NOWHERE = "http://127.0.0.1:1"
TOKEN = "ab" * 16


def write(folder: Path, name: str = "small", epochs: float = 0.5) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.replace("NAME", name).replace("EPOCHS", str(epochs)))
    return path


def start(folder: Path, *words: str, address: str = NOWHERE, **variables: str) -> subprocess.Popen[str]:
    """`bigbatch submit` in `folder`, under no Ray variables but those given."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "BIGBATCH_"))}
    environment |= {"HOME": str(folder)} | variables
    command = [sys.executable, "-m", "orchestrator", "submit", *words, "--address", address]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=folder, env=environment)


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


def end(process: subprocess.Popen[str], limit: float = 60) -> Said:
    try:
        out, err = process.communicate(timeout=limit)
    finally:
        process.kill()
    assert "Traceback" not in err, err
    return Said(process.returncode, out, err)


# ------------------------------------------------------------------------------------------------ without a cluster


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Somebody at an address, and the requests that came; it answers all as Ray does without a token."""
    came: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            came.append(f"{self.command} {self.path}")
            self.send_error(401)

        do_PUT = do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as here:
        threading.Thread(target=here.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{here.server_address[1]}", came
        here.shutdown()


def test_a_bad_recipe_reaches_no_cluster(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("epochs", "epohcs"))
    said = end(start(tmp_path, path.name, address=server[0]))
    assert said.code == 2 and 'did you mean "epochs"' in said.err and server[1] == []


def test_too_large_a_folder_is_refused_before_the_upload(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    write(tmp_path)
    (tmp_path / "data").mkdir()
    big = tmp_path / "data" / "big.npz"
    with big.open("wb") as file:
        file.truncate(150 * 2**20)
    said = end(start(tmp_path, "small.yaml", address=server[0]))
    assert said.code == 2 and said.out == "" and server[1] == []
    assert "data/big.npz (150.0 MiB)" in said.err and "100.0 MiB" in said.err and ".rayignore" in said.err
    (tmp_path / ".rayignore").write_text("data/\n")
    said = end(start(tmp_path, "small.yaml", address=server[0]))
    assert "shipping 2 files" in said.err and server[1]


def test_what_to_export_where_a_token_is_asked_for(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    write(tmp_path)
    said = end(start(tmp_path, "small.yaml", address=server[0]))
    assert said.code == 2 and "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=" in said.err
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    said = end(start(tmp_path, "small.yaml", address=server[0]))
    assert said.err.splitlines()[-1] == f"{server[0]} asks for a token: export RAY_AUTH_MODE=token"
    assert not any(line.startswith(("PUT", "POST")) for line in server[1])


@pytest.mark.parametrize("address", [NOWHERE, "127.0.0.1:1", "ray://127.0.0.1:10001"])
def test_an_address_where_nobody_is(address: str, tmp_path: Path) -> None:
    write(tmp_path)
    with at_once():
        said = end(start(tmp_path, "small.yaml", address=address))
    assert said.code == 2 and "127.0.0.1" in said.err.splitlines()[-1]


def test_an_address_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "KNOCK_LIMIT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(jobs.ClusterError, match="timed out"):
        jobs.knock(f"http://127.0.0.1:{silent.getsockname()[1]}")


class Unready:
    """A client whose cluster has no agent to start a job, for the first `times` that it is asked."""

    def __init__(self, times: float) -> None:
        self.times = times

    def get_address(self) -> str:
        return NOWHERE

    def submit_job(self, **options: object) -> str:
        self.times -= 1
        if self.times >= 0:
            raise RuntimeError("status code 500: No available agent to submit job, please try again later.")
        return "job"


def test_a_head_that_has_just_started_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL", 0.01)
    assert jobs.submit(Unready(3), "true", {}) == "job"


def test_a_head_without_an_agent_is_told_of_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL", 0.01)
    monkeypatch.setattr(jobs, "NO_AGENT_YET", 0.1)
    with pytest.raises(jobs.ClusterError, match="--dashboard-agent-listen-port"):
        jobs.submit(Unready(float("inf")), "true", {})


def test_plain_ray_has_no_jobs_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    with pytest.raises(jobs.ClusterError, match=r'pip install "ray\[default\]"'):
        jobs.shipped(tmp_path, [])


def test_files_that_ray_would_ship(tmp_path: Path) -> None:
    """The same files as in the package that Ray itself makes, and its size to within a thousandth."""
    from ray._private.runtime_env.packaging import create_package

    for name in ("a.py", "sub/b.py", "sub/left.log", "ignored.txt", ".git/x", ".venv/y", "sub/__pycache__/z", "runs/r"):
        (tmp_path / "wd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "wd" / name).write_bytes(os.urandom(20_000))
    (tmp_path / "wd" / ".gitignore").write_text("ignored.txt\n")
    (tmp_path / "wd" / "sub" / ".rayignore").write_text("*.log\n")
    excludes = [*submit.EXCLUDES, *submit.outputs(tmp_path / "wd")]
    sizes = jobs.shipped(tmp_path / "wd", excludes)
    assert set(sizes) == {"a.py", "sub/b.py", ".gitignore", "sub/.rayignore"} and sizes["a.py"] == 20_000
    create_package(str(tmp_path / "wd"), tmp_path / "p.zip", include_gitignore=True, excludes=excludes)
    package = (tmp_path / "p.zip").stat().st_size
    assert jobs.package_size(sizes) == pytest.approx(package, rel=0.01) and jobs.package_size(sizes) >= package


def test_names_of_many_small_files_are_those_of_their_folders() -> None:
    sizes = {f"images/{i}.jpg": 2**20 for i in range(50)} | {"a.bin": 2**21}
    assert submit.largest(sizes) == "images/ (50.0 MiB), a.bin (2.0 MiB)"
    assert submit.largest({"a": 2**20, "b/c": 2**21}) == "b/c (2.0 MiB), a (1.0 MiB)"


def test_what_would_be_lost_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator.recipe import load

    path = write(tmp_path)
    path.write_text(path.read_text().replace("data: digits", "data: {npz: {path: my/own.npz}}"))
    for name in ("runs/s/journal.jsonl", "old/s/journal.jsonl", "my/own.npz"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert submit.outputs(tmp_path) == ["/runs"]
    submit.check_shipment(
        load(path), submit.relative(path, tmp_path), tmp_path, {"small.yaml": 9, "old/s/journal.jsonl": 0}
    )
    said = capsys.readouterr().err
    assert "runs lies in the working directory: it is not shipped" in said
    assert "study in old/s is shipped too" in said and "my/own.npz are not shipped" in said
    with pytest.raises(jobs.ClusterError, match=r"small\.yaml would not be shipped"):
        submit.check_shipment(load(path), submit.relative(path, tmp_path), tmp_path, {})
    with pytest.raises(jobs.ClusterError, match="give --working-dir"):
        submit.relative(path, tmp_path / "old")


def test_the_entrypoint_is_quoted_and_writes_outside_the_job() -> None:
    recipe = submit.PurePosixPath("my recipes/a.yaml")
    command = submit.entrypoint(recipe, "~/my runs", ["--set=study=a b; true"])
    assert command.startswith("exec ")
    assert command.endswith("run 'my recipes/a.yaml' '--set=study=a b; true' --output ~/'my runs'")
    with pytest.raises(jobs.ClusterError, match="expected /FOLDER or ~/FOLDER"):
        submit.entrypoint(recipe, "runs", [])


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 75),
        ("STOPPED", 0, 75),
    ],
)
def test_exit_codes(status: str, code: int | None, expected: int) -> None:
    assert submit.exit_code(jobs.Ended(status, code, "why")) == expected


def test_a_token_is_looked_for_where_ray_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (authentication.MODE, authentication.TOKEN, authentication.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    assert authentication.token_source() is None
    (tmp_path / "mine").touch()
    monkeypatch.setenv(authentication.TOKEN_PATH, str(tmp_path / "mine"))
    assert authentication.token_source() == str(tmp_path / "mine")
    monkeypatch.setenv(authentication.TOKEN, TOKEN)
    monkeypatch.setenv(authentication.MODE, "token")
    assert authentication.token_source() == "$RAY_AUTH_TOKEN" and "not this cluster's" in authentication.remedy()


# -------------------------------------------------------------------------------------------------- on a real head


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def answers(address: str) -> bool:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        return urllib.request.urlopen(request, timeout=2).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard's address of a Ray head with a token, in a session directory of its own."""
    home = tmp_path_factory.mktemp("head")
    port, dashboard, agent = free_ports(3)  # all its own: it may run beside another Ray
    directory = f"/tmp/bigbatch-test-{os.getpid()}"  # short: it holds unix sockets
    scripts = str(Path(sys.executable).parent)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "BIGBATCH_"))}
    environment |= {"HOME": str(home), "PATH": f"{scripts}:{environment['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    options = ["--num-cpus=4", f"--port={port}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    options += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    options += [f"--temp-dir={directory}", "--object-store-memory=100000000"]
    command = [f"{scripts}/ray", "start", "--head", "--block", *options]
    with open(home / "log", "wb") as log:
        ray = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=home, start_new_session=True)
    try:
        limit = time.monotonic() + 60
        while not answers(f"http://127.0.0.1:{dashboard}"):
            assert ray.poll() is None and time.monotonic() < limit, (home / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        kill_all(ray)
        shutil.rmtree(directory, ignore_errors=True)


def kill_all(ray: subprocess.Popen[bytes]) -> None:
    ours = [*psutil.Process(ray.pid).children(recursive=True), psutil.Process(ray.pid)]
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    ray.wait()


AS_CLIENT = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture(scope="module")
def ends(head: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    """Three studies at once: one on two workers that ends well, one that fails, one that is stopped."""
    folder = tmp_path_factory.mktemp("work")
    common = ("--wait", "-o", str(folder / "cluster runs"))
    two = ("--set", "cluster={workers: 2}")
    broken = ("--allow-code", "--set", "workload.model={import: 'json:no_such_function'}")
    # RAY_ADDRESS would lead Ray's own client elsewhere
    variables = AS_CLIENT | {"RAY_ADDRESS": "127.0.0.1:1"}
    started = {
        name: start(folder, write(folder, name, epochs).name, *common, *words, address=head, **variables)
        for name, epochs, words in (("good", 0.5, two), ("broken", 0.5, broken), ("long", 5000, ()))
    }
    job = started["long"].stdout.readline().strip()  # type: ignore[union-attr]
    status = folder / "cluster runs" / "long" / "status.json"
    limit = time.monotonic() + 90
    while not (status.exists() and json.loads(status.read_text())["running"]):
        assert started["long"].poll() is None and time.monotonic() < limit
        time.sleep(0.2)
    request = urllib.request.Request(
        f"{head}/api/jobs/{job}/stop", headers={"Authorization": f"Bearer {TOKEN}"}, method="POST"
    )
    urllib.request.urlopen(request, timeout=10).close()
    said = {name: end(process, 120) for name, process in started.items()}
    said["state"] = Said(json.loads(status.read_text())["exit_code"], status.read_text(), "")
    said["results"] = Said(
        0, " ".join(sorted(p.parts[-4] for p in folder.glob("cluster runs/*/trials/*/result.json"))), ""
    )
    return said


def test_a_study_that_ends_well(ends: dict[str, Said]) -> None:
    said = ends["good"]
    assert said.code == 0, said
    assert said.out.startswith("raysubmit_") and "[1/1]" in said.out
    assert "report.html" in said.out and "shipping" in said.err and "INFO" not in said.err
    assert "good" in ends["results"].out


def test_a_study_whose_trial_fails(ends: dict[str, Said]) -> None:
    assert ends["broken"].code == 3 and "no_such_function" in ends["broken"].out


def test_a_job_that_was_stopped(ends: dict[str, Said]) -> None:
    """Also its driver had the time to end in order."""
    assert ends["long"].code == 75 and "goes on" in ends["long"].err
    assert ends["state"].code == 75 and json.loads(ends["state"].out)["state"] == "interrupted"


def test_without_wait_the_job_goes_on_alone(head: str, tmp_path: Path) -> None:
    write(tmp_path)
    said = end(start(tmp_path, "small.yaml", "-o", str(tmp_path / "runs"), address=head, **AS_CLIENT))
    job = said.out.strip()
    assert said.code == 0 and job.startswith("raysubmit_")
    assert (
        f"ray job logs --follow --address {head} {job}" in said.err
        and f"ray job stop --address {head} {job}" in said.err
    )


def test_ctrl_c_leaves_the_job(head: str, tmp_path: Path) -> None:
    write(tmp_path, epochs=5000)
    process = start(tmp_path, "small.yaml", "--wait", "-o", str(tmp_path / "runs"), address=head, **AS_CLIENT)
    job = process.stdout.readline().strip()  # type: ignore[union-attr]
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = end(process)
    assert said.code == 130 and "the job goes on" in said.err and f"{head} {job}" in said.err


def test_without_the_token(head: str, tmp_path: Path) -> None:
    write(tmp_path)
    said = end(start(tmp_path, "small.yaml", address=head))
    assert said.code == 2 and said.out == "" and "export RAY_AUTH_MODE=token" in said.err
    wrong = end(start(tmp_path, "small.yaml", address=head, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="cd" * 16))
    assert wrong.code == 2 and "the token in $RAY_AUTH_TOKEN is not this cluster's" in wrong.err
