"""Ray on this machine: its version, its token, and dashboards that anybody may use. Without importing ray."""

from __future__ import annotations

import http.client
import importlib.util
import ipaddress
import urllib.error
import urllib.request
from collections.abc import Callable

import psutil

from cluster import authentication as token
from orchestrator.doctor.finding import Finding, bad, ok, warn
from orchestrator.doctor.software import installed

OLDEST = (2, 52)  # the first with CVE-2025-62593 closed and with tokens
DASHBOARD_PORT = 8265
PATIENCE = 1.0  # seconds for one answer
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def version() -> Finding:
    found = installed("ray")
    if found is None:
        return warn("ray", "not installed: one worker only", 'pip install "bigbatch[ray]"')
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return bad("ray", f"{found}: web pages can run code through it (CVE-2025-62593)", 'pip install "ray>=2.52"')
    jobs = importlib.util.find_spec("aiohttp_cors")
    return ok("ray", found if jobs else f"{found}, without the Jobs client: bigbatch submit needs ray[default]")


def authentication() -> Finding:
    """What `ray job submit` and `bigbatch submit` would meet in this environment."""
    name, mode, source = "ray authentication", token.mode(), token.token_source()
    if mode == "token":
        return ok(name, f"by the token in {source}") if source else bad(name, "asked for, but no token", token.remedy())
    if mode == "disabled":
        said = "RAY_AUTH_MODE=disabled: whoever reaches a dashboard of yours runs code as you"
        return warn(name, said, "unset RAY_AUTH_MODE, or export RAY_AUTH_MODE=token")
    if source:
        said = f"clusters ask for the token in {source}, clients do not send it: jobs fail with 401"
        return warn(name, said, token.remedy())
    return ok(name, "no token, none asked for; clusters that bigbatch starts have one of their own")


def dashboard() -> Finding:
    """Ray takes jobs, which is any command, from all who reach its dashboard, unless it asks for a token."""
    name, found = "ray dashboard", dashboards()
    answers = {address: answer(*address) for address in found}
    open_to_all = [f"{host}:{port}" for (host, port), code in answers.items() if code == 200 and not is_loopback(host)]
    if open_to_all:
        remedy = "end it, and start it with --dashboard-host 127.0.0.1 under RAY_AUTH_MODE=token"
        return bad(name, f"{', '.join(open_to_all)} takes jobs from anyone on the network without a token", remedy)
    ours = [f"{host}:{port}" for (host, port), code in answers.items() if code in (200, 401, 403)]
    return ok(name, f"{', '.join(ours)}, not open to the network" if ours else "none is listening")


def dashboards(connections: Callable[..., list] = psutil.net_connections) -> list[tuple[str, int]]:
    """Where Ray dashboards of this machine listen, as far as this user may see."""
    try:
        sockets = [s for s in connections("tcp") if s.status == psutil.CONN_LISTEN]
    except psutil.AccessDenied:
        return []
    return sorted({tuple(s.laddr) for s in sockets if s.laddr[1] == DASHBOARD_PORT or is_dashboard(s.pid)})


def is_dashboard(pid: int | None) -> bool:
    try:
        return pid is not None and "ray/dashboard/dashboard.py" in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host.split("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def answer(host: str, port: int) -> int | None:
    """The status code of its list of jobs, asked for without a token; None if it is no dashboard (its metrics, say)."""
    reach = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    try:
        with NO_PROXY.open(f"http://{reach}:{port}/api/jobs/", timeout=PATIENCE) as reply:
            return int(reply.status) if reply.read(1) == b"[" else None
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None
