"""Copies the metrics of a study to Weights & Biases, in a process of its own, so that nothing of it reaches training.

`metrics.jsonl` is the truth and W&B a copy. A trial is one run, in one piece: an offline run that was cut short (a
crash, a kill, an interrupted study) is thrown away when the study goes on, and written anew from the first row, so that
the runs of a study hold each logged step once. Until then, a kill costs the last second or so of rows. Online, the
server says which step it has, and rows go on from there. `trials/<id>/wandb.json` marks trials whose run is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import netrc
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import psutil

from orchestrator.environment import redact
from orchestrator.files import Tail, read_json, write_atomic, write_json
from orchestrator.recipe.schema import Wandb

POLL = 0.5  # seconds between looks at the study
PACE = 0.2  # seconds between runs made online: the server refuses more than 80 per second and project
PROBE = 3.0  # seconds in which a server must answer
NICENESS = 10  # of the process that copies, and of W&B's own, which it starts
DRAIN = 60  # seconds that the last rows may take once the driver is gone
SUCCESS = ("done", "pruned")
NOT_INSTALLED = 'W&B is not installed: pip install "bigbatch[wandb]"; metrics.jsonl has everything'


# ------------------------------------------------------------------------------------------------- in the driver


class Mirror:
    """The process that copies, as the driver holds it. It lives until `stop`, or until the driver is gone."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def stop(self, patience: float = 20.0) -> None:
        """Says that the study has ended, waits up to `patience` seconds for the last rows, then ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # with W&B's own process; metrics.jsonl has everything
            self.process.wait()


def start(study: Path, options: Wandb) -> Mirror | None:
    """Starts to copy the study in this directory. None if it is not wanted, or, with a note on stderr, cannot be."""
    mode = os.environ.get("WANDB_MODE", options.mode)
    if mode == "disabled" or os.environ.get("BIGBATCH_NO_TRACKING"):
        return None
    if not _installed():
        print(NOT_INSTALLED, file=sys.stderr)
        return None
    asked = options.model_copy(update={"mode": mode if mode in ("offline", "online") else options.mode})
    try:
        return Mirror(_spawn(study, asked))
    except OSError as error:
        print(f"W&B copy not started: {error}; metrics.jsonl has everything", file=sys.stderr)
        return None


def _installed() -> bool:
    """A mere directory `wandb`, as W&B itself leaves it where it runs, is no installation: it has no origin."""
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None


def _spawn(study: Path, options: Wandb) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C is for the driver, which then closes the pipe."""
    with open(study / "wandb_mirror.log", "ab") as log:
        return subprocess.Popen(
            _command(study, options), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )


def _command(study: Path, options: Wandb) -> list[str]:
    return [sys.executable, "-m", "orchestrator.wandb_mirror", str(study), options.model_dump_json()]


# --------------------------------------------------------------------------------------------- in its own process


class Copy:
    """One trial on its way into one run."""

    def __init__(self, trial: Path) -> None:
        self.trial = trial
        self.tail = Tail(trial / "metrics.jsonl")
        self.run: Any = None  # wandb.Run, from the first row on
        self.last = -1  # step of the last row that was copied

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Rows at or below the last step come from a trial that went back to a checkpoint: W&B has them."""
        for row in rows:
            if row["step"] > self.last:
                self.last = row["step"]
                self.run.log({k: v for k, v in row.items() if v is not None}, step=self.last, commit=True)

    def finish(self, result: dict[str, Any]) -> None:
        self.run.summary.update(summary(result))
        self.run.finish(exit_code=0 if result["status"] in SUCCESS else 1)

    def leave(self) -> None:
        """The study ended before the trial did."""
        self.run.mark_preempting()
        self.run.finish(exit_code=1)


class Copier:
    """Follows all trials of a study."""

    def __init__(self, study: Path, options: Wandb, token: str) -> None:
        self.study = study
        self.options = options
        self.group = study.resolve().name
        self.token = token
        self.copies: dict[str, Copy] = {}
        self.finished: dict[str, Any] = {}  # trial -> stamp of the result whose run is complete
        self.lost: set[str] = set()  # trials that could not be copied: tried again when the study is run again

    def sweep(self) -> None:
        """Copies what is new."""
        for trial in sorted((self.study / "trials").glob("*/")):
            if trial.name not in self.lost:
                self._guarded(trial)

    def _guarded(self, trial: Path) -> None:
        try:
            self._follow(trial)
        except Exception as error:
            log(f"{trial.name}: not copied: {type(error).__name__}: {error}")
            self.lost.add(trial.name)

    def _follow(self, trial: Path) -> None:
        stamp = _stamp(trial / "result.json")  # before the rows are read, so that all rows of the result are
        if stamp and stamp == self._finished(trial):
            return
        copy = self.copies.setdefault(trial.name, Copy(trial))
        rows = copy.tail.new()
        if (rows or stamp) and not copy.run:
            copy.run = self._begin(trial)
            copy.last = copy.run.starting_step - 1
        copy.log(rows)
        if stamp:
            self._end(copy, stamp)

    def _finished(self, trial: Path) -> Any:
        marker = trial / "wandb.json"
        if trial.name not in self.finished and marker.exists():
            self.finished[trial.name] = read_json(marker)["result"]
        return self.finished.get(trial.name)

    def _end(self, copy: Copy, stamp: list[int]) -> None:
        copy.finish(read_json(copy.trial / "result.json"))
        write_json(copy.trial / "wandb.json", {"finished": True, "last_step": copy.last, "result": stamp})
        self.finished[copy.trial.name] = stamp
        del self.copies[copy.trial.name]

    def _begin(self, trial: Path) -> Any:
        config = read_json(trial / "config.json")
        identity = f"{self.token}-{trial.name}"
        for cut_short in (self.study / "wandb").glob(f"*run-*-{identity}"):
            shutil.rmtree(cut_short)
        if self.options.mode == "online":
            time.sleep(PACE)
        try:
            return self._init(identity, config)
        except Exception as error:
            if self.options.mode == "offline":
                raise
            self._go_offline(f"{type(error).__name__}: {error}")
            self._start_anew()

    def _go_offline(self, why: str) -> None:
        log(f"W&B runs are kept offline, in {self.study.name}/wandb (wandb sync sends them): {why}")
        self.options = self.options.model_copy(update={"mode": "offline"})

    def _start_anew(self) -> NoReturn:
        """W&B's own process still holds the run that failed, and would refuse it: replace both processes."""
        children = psutil.Process().children(recursive=True)
        for child in children:
            child.kill()
        psutil.wait_procs(children, timeout=PROBE)
        os.execv(sys.executable, _command(self.study, self.options))

    def _init(self, identity: str, config: dict[str, Any]) -> Any:
        import wandb

        online = self.options.mode == "online"
        run = wandb.init(
            **self.options.model_dump(),
            id=identity,
            group=self.group,
            name=f"{config['arm']} b={config['base']['batch']} s={config['seed']}",
            job_type=config["arm"],
            config=filled(redact(config)),
            dir=self.study,
            resume="allow" if online else None,
            reinit="create_new",
            allow_val_change=True,
            settings=wandb.Settings(**SETTINGS),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def check_server(self) -> None:
        """Asked for online, without a server or a key: offline, before W&B has blocked on it for minutes."""
        import wandb

        if self.options.mode == "online" and (why := unreachable(wandb.setup().settings.base_url)):
            self._go_offline(why)

    def close(self) -> None:
        """The last rows of all trials, and an end for those that have none."""
        self.sweep()
        for copy in self.copies.values():
            if copy.run and copy.trial.name not in self.lost:
                copy.leave()


SETTINGS: dict[str, Any] = {
    "x_transaction_log_flush_interval": 1.0,  # seconds; 15 by default, and a kill loses what was not flushed
    "x_disable_stats": True,  # system metrics have steps of their own, which clash with ours
    "x_disable_meta": True,  # paths, host, command line
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "disable_git": True,
    "disable_code": True,
    "disable_job_creation": True,
    "symlink": False,
    "console": "off",
    "silent": True,
    "init_timeout": 15.0,
}


def filled(config: Any) -> Any:
    """`config` without None and empty maps, which W&B cannot merge when a run goes on."""
    if not isinstance(config, dict):
        return config
    items = {key: filled(value) for key, value in config.items()}
    return {key: value for key, value in items.items() if value is not None and value != {}}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a result under flat names: `final/test_accuracy`, `target/step`, `seconds/train`."""
    flat = {
        f"{part}/{k}": v for part in ("final", "best", "target", "seconds") for k, v in (result.get(part) or {}).items()
    }
    plain = {k: result.get(k) for k in ("status", "steps", "epochs", "examples", "examples_per_second", "parameters")}
    return {k: v for k, v in (plain | flat).items() if v is not None}


def unreachable(base_url: str) -> str | None:
    """Why W&B at this address cannot be used: no key, or no answer within 3 s. None if it can."""
    url = urlsplit(base_url)
    host = url.hostname or ""
    if not os.environ.get("WANDB_API_KEY") and not _netrc_has(host):
        return f"no API key for {host}: run wandb login, or set WANDB_API_KEY"
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        url = urlsplit(proxy)
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname, port), timeout=PROBE).close()
    except OSError as error:
        return f"no answer from {url.hostname}: {error}"
    return None


def _netrc_has(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _token(study: Path) -> str:
    """Tells apart the runs of studies that hold the same trial. Kept with the study, wherever it is moved."""
    path = study / "wandb" / "study_token"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, secrets.token_hex(3))
    return path.read_text()


def _stamp(path: Path) -> list[int] | None:
    """Changes whenever the file is replaced."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_mtime_ns, stat.st_size]


def log(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def give_way() -> None:
    """Training comes first. Many Linux systems weigh sessions against each other, and processes only within theirs."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError):  # no such thing here, or not allowed
        Path("/proc/self/autogroup").write_text(str(NICENESS))


def main() -> None:
    """`python -m orchestrator.wandb_mirror STUDY_DIR OPTIONS_JSON`: copies until its standard input ends."""
    give_way()
    os.environ.pop("WANDB_SERVICE", None)  # W&B's own process is to be ours, not one that someone else ends
    study = Path(sys.argv[1])
    token = _token(study)
    with open(study / "wandb" / "study_token") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the copier of a driver that was killed may still be at its last rows
        copier = Copier(study, Wandb.model_validate(json.loads(sys.argv[2])), token)
        copier.check_server()
        while not select.select([sys.stdin], [], [], POLL)[0]:
            copier.sweep()
        signal.alarm(DRAIN)
        copier.close()


if __name__ == "__main__":
    main()
