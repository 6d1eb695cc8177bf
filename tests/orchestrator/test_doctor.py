"""`bigbatch doctor`: each check under the condition that it is for, planted; JSON, text, exit codes, the time limit."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from orchestrator import doctor
from orchestrator.doctor import data_sets, machine, ray_cluster, software
from orchestrator.doctor.finding import Finding, bad, ok
from tests.waiting import at_once

VARIABLES = (
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "WANDB_MODE",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "NETRC",
    "BIGBATCH_NO_TRACKING",
    "BIGBATCH_DATA",
    "OMP_NUM_THREADS",
    "GLOO_SOCKET_IFNAME",
    "TORCH_EXTENSIONS_DIR",
    "XDG_CACHE_HOME",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with nothing in it, and none of the variables that checks read."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def versions(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    for module in (software, ray_cluster):
        monkeypatch.setattr(module, "installed", found.get)


def status(finding: Finding) -> str:
    assert (finding.remedy is None) == (finding.status == "ok"), "what is wrong has a remedy"
    return finding.status


# -------------------------------------------------------------------------------------------------------- the whole


def test_a_check_that_hangs_or_raises_costs_only_its_own_finding() -> None:
    checks = {"stuck": lambda: time.sleep(60), "broken": lambda: 1 / 0, "fine": lambda: ok("fine", "yes")}
    with at_once():
        stuck, broken, fine = doctor.examine(checks, limit=0.3)  # type: ignore[arg-type]
    assert (stuck.name, status(stuck)) == ("stuck", "warn") and "0.3 s" in stuck.message
    assert (broken.name, status(broken)) == ("broken", "warn") and "ZeroDivisionError" in broken.message
    assert fine == ok("fine", "yes")


def test_text_is_aligned_and_cannot_steer_the_terminal() -> None:
    text = doctor.as_text([ok("a", "fine"), bad("longer", "wrong \x1b]0;x\x07", "mend\nit")])
    assert text.splitlines() == ["ok    a       fine", "bad   longer  wrong ]0;x", "              -> mend it"]


def test_the_command_in_json_and_its_exit_codes(tmp_path: Path) -> None:
    """All checks for real, once with a stale lock and once without; it changes nothing and tells no secret."""
    lock = tmp_path / "ext" / "op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "ext"), "WANDB_API_KEY": "canary" * 7}
    environment |= {"RAY_AUTH_TOKEN": "canary" * 6, "RAY_AUTH_MODE": "token"}
    command = [sys.executable, "-m", "orchestrator", "doctor", "--output", str(tmp_path / "runs")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, env=environment)
    findings = {f["name"]: f for f in json.loads(done.stdout)}
    assert list(findings) == list(doctor.checks(tmp_path))
    assert all(set(f) == {"name", "status", "message", "remedy"} for f in findings.values())
    assert findings["extension locks"]["status"] == "bad" and str(lock) in findings["extension locks"]["remedy"]
    assert findings["torch"]["status"] == "ok" and findings["communication"]["status"] == "ok"
    assert done.returncode == 3 and lock.exists() and not (tmp_path / "runs").exists()
    lock.unlink()
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert len(again.stdout.splitlines()) >= len(findings)
    assert again.returncode == (3 if "\nbad " in f"\n{again.stdout}" else 0)
    assert "canary" not in done.stdout + done.stderr + again.stdout + again.stderr


# --------------------------------------------------------------------------------------------------------- software


def test_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(software.python()) == "ok"
    monkeypatch.setattr(software, "OLDEST_PYTHON", (99, 0))
    assert status(software.python()) == "bad"


def test_untested_versions_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# tested==0\ntorch==2.13.0\nray==2.60.0\nwandb==0.31.0\n")
    versions(monkeypatch, torch="2.13.0+cpu", ray="2.60.0")
    fine = software.packages(constraints)
    assert status(fine) == "ok" and "wandb not installed" in fine.message
    versions(monkeypatch, torch="2.13.0", ray="2.59.1")
    other = software.packages(constraints)
    assert status(other) == "warn" and other.remedy == "pip install ray==2.60.0"
    assert status(software.packages(tmp_path / "none")) == "ok"


def test_the_shipped_constraints_are_read() -> None:
    assert {"torch", "ray", "wandb"} <= software.tested_versions(software.CONSTRAINTS).keys()


def torch_that(monkeypatch: pytest.MonkeyPatch, code: str, limit: float = 30) -> software.Torch:
    monkeypatch.setattr(software, "PROBE", code)
    return software.Torch(limit)


@pytest.mark.parametrize(
    ("code", "limit", "said"),
    [
        ("import time; time.sleep(60)", 0.5, "did not end within 0.5 s"),
        ("import os; os.abort()", 30, "killed by signal 6"),
        ("raise ImportError('libtorch.so: no such file')", 30, "libtorch.so: no such file"),
    ],
)
def test_a_broken_torch(code: str, limit: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = torch_that(monkeypatch, code, limit)
    found = software.devices(torch)
    assert status(found) == "bad" and said in found.message
    assert status(software.communication(torch)) == "bad"


def told(monkeypatch: pytest.MonkeyPatch, **differs: object) -> software.Torch:
    says = {"version": "2.13.0", "cuda": None, "devices": [], "gloo": True, "nccl": False} | differs
    return torch_that(monkeypatch, f"print('a warning')\nprint({json.dumps(says)!r})")


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "gpus", lambda: ["H200"])
    found = software.devices(told(monkeypatch))
    assert status(found) == "warn" and "H200" in found.message
    assert status(software.devices(told(monkeypatch, devices=["H200"]))) == "ok"


def test_torch_without_gloo_or_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(software.communication(told(monkeypatch))) == "ok"
    assert status(software.communication(told(monkeypatch, gloo=False))) == "bad"
    assert status(software.communication(told(monkeypatch, devices=["a", "b"]))) == "bad"
    assert software.communication(told(monkeypatch, devices=["a", "b"], nccl=True)).message == "gloo, NCCL"


def test_wandb_mode_and_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "no API key" in software.wandb().message and status(software.wandb()) == "ok"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert status(software.wandb()) == "warn"
    (home / ".netrc").write_text("machine api.wandb.ai login user password canary\n")
    (home / ".netrc").chmod(0o600)
    assert status(software.wandb()) == "ok" and "canary" not in software.wandb().message
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert status(software.wandb()) == "warn"
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    assert status(software.wandb()) == "ok" and "canary" not in software.wandb().message
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "switched off" in software.wandb().message


# -------------------------------------------------------------------------------------------------------------- ray


@pytest.mark.parametrize(("found", "expected"), [("2.60.0", "ok"), ("2.52.0", "ok"), ("2.51.1", "bad"), (None, "warn")])
def test_ray_version(found: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, **({"ray": found} if found else {}))
    assert status(ray_cluster.version()) == expected


def test_a_token_that_clients_would_not_send(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(ray_cluster.authentication()) == "ok"
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("canary")
    trap = ray_cluster.authentication()
    assert status(trap) == "warn" and trap.remedy == "export RAY_AUTH_MODE=token" and "401" in trap.message
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert status(ray_cluster.authentication()) == "ok" and "canary" not in ray_cluster.authentication().message
    token.unlink()
    none = ray_cluster.authentication()
    assert status(none) == "bad" and "RAY_AUTH_TOKEN=" in str(none.remedy)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert status(ray_cluster.authentication()) == "warn"


class Dashboard(http.server.BaseHTTPRequestHandler):
    code, body = 200, b"[]"

    def do_GET(self) -> None:
        assert self.path == "/api/jobs/" and "Authorization" not in self.headers
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Starts a server that answers like a dashboard, and has it found."""
    servers = []

    def start(host: str, code: int, body: bytes = b"[]") -> int:
        handler = type("Handler", (Dashboard,), {"code": code, "body": body})
        server = http.server.ThreadingHTTPServer((host, 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        port = server.server_address[1]
        monkeypatch.setattr(ray_cluster, "dashboards", lambda: [(host, port)])
        return port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("host", "code", "body", "expected"),
    [
        ("0.0.0.0", 200, b"[]", "bad"),
        ("0.0.0.0", 401, b"", "ok"),
        ("127.0.0.1", 200, b"[]", "ok"),
        ("0.0.0.0", 200, b"# HELP metrics", "ok"),
    ],
)
def test_a_dashboard_open_to_the_network(serve, host: str, code: int, body: bytes, expected: str) -> None:  # type: ignore[no-untyped-def]
    port = serve(host, code, body)
    found = ray_cluster.dashboard()
    assert status(found) == expected
    assert (f"{host}:{port}" in found.message) == (not body.startswith(b"#"))


def test_a_server_that_says_nothing_is_no_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "PATIENCE", 0.2)
    with socket.create_server(("0.0.0.0", 0)) as server:
        monkeypatch.setattr(ray_cluster, "dashboards", lambda: [("0.0.0.0", server.getsockname()[1])])
        assert ray_cluster.dashboard().message == "none is listening"


def test_dashboards_are_found_by_port_and_by_command(tmp_path: Path) -> None:
    program = tmp_path / "ray" / "dashboard" / "dashboard.py"
    program.parent.mkdir(parents=True)
    program.write_text("import time; print(flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()  # type: ignore[union-attr]
            sockets = [
                SimpleNamespace(status=psutil.CONN_LISTEN, laddr=("0.0.0.0", 8265), pid=None),
                SimpleNamespace(status=psutil.CONN_LISTEN, laddr=("0.0.0.0", 5000), pid=process.pid),
                SimpleNamespace(status=psutil.CONN_LISTEN, laddr=("0.0.0.0", 5001), pid=os.getpid()),
                SimpleNamespace(status="ESTABLISHED", laddr=("0.0.0.0", 8265), pid=None),
            ]
            assert ray_cluster.dashboards(lambda kind: sockets) == [("0.0.0.0", 5000), ("0.0.0.0", 8265)]
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert ray_cluster.is_loopback(host) is expected


# ---------------------------------------------------------------------------------------------------------- machine


def test_a_hostname_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert status(machine.hostname()) == "ok"
    monkeypatch.setattr(socket, "gethostname", lambda: "nowhere.invalid")
    found = machine.hostname()
    assert status(found) == "warn" and "/etc/hosts" in str(found.remedy)


@pytest.mark.parametrize(("asked", "expected"), [("lo", "ok"), ("^docker0", "bad"), ("lo,nope9", "bad")])
def test_an_interface_that_is_not_there(asked: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": []})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", asked)
    assert status(machine.interfaces()) == expected


def test_no_ports_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(machine.ports()) == "ok"

    def refuse(address: tuple[str, int]) -> socket.socket:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert status(machine.ports()) == "bad"


@pytest.mark.parametrize(("free", "expected"), [(2**29, "bad"), (5 * 2**30, "warn"), (2**40, "ok")])
def test_a_full_disk(free: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=free))
    assert status(machine.disk("disk", tmp_path / "not" / "there")) == expected
    assert asked == [tmp_path]


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert status(machine.disk("disk", tmp_path / "file" / "runs")) == "bad"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert status(machine.disk("disk", tmp_path)) == "bad"


def test_stale_locks_are_told_and_left(home: Path) -> None:
    root = home / ".cache" / "torch_extensions"
    assert status(machine.locks()) == "ok"
    for name, age in (("old one", 3600.0), ("new", 5.0)):
        lock = root / "py311_cpu" / name / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    found = machine.locks()
    assert status(found) == "bad" and str(found.remedy).endswith(f"rm '{root}/py311_cpu/old one/lock'")
    assert len(list(root.glob("*/*/lock"))) == 2


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, "ok"), ("2", "ok"), ("9", "warn"), ("0", "warn"), ("x", "warn")]
)
def test_odd_thread_counts(asked: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert status(machine.threads()) == expected


# ------------------------------------------------------------------------------------------------------------- data


def test_data_sets_that_are_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGBATCH_DATA", str(tmp_path / "nowhere"))
    assert status(data_sets.data()) == "bad"
    monkeypatch.setenv("BIGBATCH_DATA", str(tmp_path))
    assert status(data_sets.data()) == "warn"
    (tmp_path / "mnist").mkdir()
    for name in data_sets.mnist.NAMES:
        (tmp_path / "mnist" / f"{name}.gz").touch()
    (tmp_path / "fsdd" / "recordings").mkdir(parents=True)
    (tmp_path / "fsdd" / "recordings" / "7_jackson_0.wav").touch()
    (tmp_path / "own.npz").touch()
    for split in ("train", "test"):
        (tmp_path / "pets" / split).mkdir(parents=True)
    found = data_sets.data()
    assert status(found) == "ok" and found.message.endswith(": mnist, spoken_digits, own.npz, pets/")
