"""How a study stands, for people: a live view on a terminal, plain lines elsewhere, and `bigbatch status`."""

from __future__ import annotations

import contextlib
import difflib
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.files import Damaged, printable, read_json
from orchestrator.terminal import say

ROWS = 12  # running trials shown at once
SILENCE = 30.0  # seconds without an update after which a running study is said to be silent
STYLES = {"failed": "red", "diverged": "red", "interrupted": "yellow", "done": "green"}
HINTS = {"interrupted": "run the same command again to resume"}
USAGE = 2  # exit code


# ----------------------------------------------------------------------------------------------------------- words


def duration(seconds: float | None) -> str:
    """`0:41`, `1:02:03`; `?` if unknown."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def number(value: float | None) -> str:
    """Four significant digits; whole thousands as they are."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def name(trial: dict[str, Any]) -> str:
    return printable(f"{trial['arm']} batch {trial['batch']} seed {trial['seed']}")


def counts(trials: dict[str, int]) -> str:
    """`12 of 24 trials done, 1 failed, 2 running, 10 left`; failures, and trials given up, only where there are any."""
    others = [
        (trials.get(k, 0), k)
        for k in ("failed", "diverged", "pruned", "running", "left")
        if trials.get(k) or k in ("running", "left")
    ]
    return ", ".join([f"{trials['done']} of {trials['total']} trials done", *(f"{n} {word}" for n, word in others)])


def ended_line(result: dict[str, Any], status: dict[str, Any]) -> str:
    """`[12/24] sgd batch 128 seed 1: target 0.95 at step 140, accuracy 0.972, 1.3 s, ETA 0:41`."""
    trials = status["trials"]
    place = f"[{trials['total'] - trials['running'] - trials['left']}/{trials['total']}]"
    eta = "" if result["status"] == "failed" else f", ETA {duration(status['eta_seconds'])}"
    return f"{place} {result_line(result)}{eta}"


def result_line(result: dict[str, Any]) -> str:
    """`sgd batch 128 seed 1: target 0.95 at step 140, accuracy 0.972, 1.3 s`, or the error of a failed trial."""
    if result["status"] == "failed":
        return f"{name(result)}: FAILED: {printable(str(result['error']))}"
    seconds = result["seconds"]["train"]
    return (
        f"{name(result)}: {', '.join(_outcome(result))}, {'read from file' if seconds is None else f'{seconds:.1f} s'}"
    )


def _outcome(result: dict[str, Any]) -> list[str]:
    if result["status"] != "done":
        return [f"{result['status'].upper()} at step {result['steps']}"]
    accuracy, loss = (result["final"].get(metric) for metric in ("test_accuracy", "train_loss"))
    last = f"accuracy {number(accuracy)}" if accuracy is not None else f"loss {number(loss)}"
    return [*_target(result["target"]), last, *(["reused"] if result.get("reused") else [])]


def _target(target: dict[str, Any] | None) -> list[str]:
    if not target:
        return []
    return [f"target {target['value']:g} " + (f"at step {target['step']}" if target["reached"] else "not reached")]


# ------------------------------------------------------------------------------------------------------------ view


def render(status: dict[str, Any]) -> RenderableType:
    """All of a study on a few lines: its state, counts, time left, and the running trials."""
    trials = status["trials"]
    bar = Table.grid()  # a bar on its own has no end of line
    bar.add_row(ProgressBar(trials["total"], trials["total"] - trials["running"] - trials["left"], width=60))
    return Group(_headline(status), bar, *([_running(status["running"])] if status["running"] else []))


def _headline(status: dict[str, Any]) -> Text:
    state = status["state"]
    line = Text(printable(status["study"]), style="bold").append("  ").append(state, style=STYLES.get(state, "cyan"))
    line.append(f"  {counts(status['trials'])}", style="not bold")
    if state == "running":
        line.append(f"  ETA {duration(status['eta_seconds'])}", style="not bold")
        if (silent := time.time() - status["updated"]) > SILENCE:
            line.append(f"  no news for {duration(silent)}", style="yellow")
    return line.append(f": {HINTS[state]}" if state in HINTS else "", style="not bold")


def _running(running: list[dict[str, Any]]) -> Table:
    table = Table("trial", box=None, pad_edge=False, header_style="dim")
    for column in ("step", "epoch", "loss", "accuracy", "examples/s"):
        table.add_column(column, justify="right")
    for trial in running[:ROWS]:
        values = (number(trial.get(key)) for key in ("train_loss", "test_accuracy", "examples_per_second"))
        table.add_row(Text(name(trial)), *(_of(trial, done, all_) for done, all_ in BUDGETS), *values)
    if len(running) > ROWS:
        table.add_row(f"and {len(running) - ROWS} more")
    return table


BUDGETS = (("step", "steps"), ("epoch", "epochs"))  # a recipe gives one of the two


def _of(trial: dict[str, Any], done: str, budget: str) -> str:
    """`40/140`, `40` where there is no such budget."""
    total = trial.get(budget)
    return number(trial.get(done)) + (f"/{number(total)}" if total else "")


class Progress:
    """What `bigbatch run` shows on stderr. Nothing that goes wrong with it reaches the driver."""

    def __init__(self, console: Console | None = None) -> None:
        # bound to this stream: a trial in this very process sends its own output to a file meanwhile
        self.console = console or Console(file=sys.stderr, highlight=False)
        self.live: Live | None = None

    def __enter__(self) -> Progress:
        with contextlib.suppress(Exception):
            if self.console.is_terminal and not self.console.is_dumb_terminal:
                self.live = Live(console=self.console, auto_refresh=False, redirect_stdout=False)
                self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(Exception):
            if self.live:
                self.live.stop()

    def update(self, status: dict[str, Any]) -> None:
        """The study stands as `status.json` has it."""
        with contextlib.suppress(Exception):
            if self.live:
                self.live.update(render(status), refresh=True)

    def ended(self, result: dict[str, Any], status: dict[str, Any]) -> None:
        """A trial has ended, and `status` counts it so. A live view shows good ends as counts only."""
        with contextlib.suppress(Exception):
            if not self.live or result["status"] in ("failed", "diverged"):
                style = STYLES.get(result["status"], "") if result["status"] != "done" else ""
                self.console.print(Text(ended_line(result, status), style=style), soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------- status


def show_status(study: Path, watch: bool, as_json: bool) -> int:
    """`bigbatch status`: prints how a study stands, once or until it has ended. Returns the exit code."""
    try:
        statuses = follow(study) if watch else iter([read_status(study)])
        _print_json(statuses) if as_json else _print_view(statuses)
    except (OSError, ValueError) as error:
        say(str(error))
        return USAGE
    except KeyboardInterrupt:
        return 130
    return 0


def _print_json(statuses: Iterator[dict[str, Any]]) -> None:
    """A line each."""
    for status in statuses:
        print(json.dumps(status, sort_keys=True), flush=True)


def _print_view(statuses: Iterator[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        for status in statuses:
            console.print(render(status))
        return
    with Live(console=console, auto_refresh=False) as live:
        for status in statuses:
            live.update(render(status), refresh=True)


def follow(study: Path, poll: float = 0.5) -> Iterator[dict[str, Any]]:
    """The status each time that it changes, until the study no longer runs."""
    status: dict[str, Any] = {}
    while status.get("state", "running") == "running":
        if (now := read_status(study)) != status:
            status = now
            yield status
        else:
            time.sleep(poll)


def read_status(study: Path) -> dict[str, Any]:
    """`status.json`, with state `interrupted` if its driver is gone. Raises ValueError for what is no study."""
    try:
        status = read_json(study / "status.json")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(_no_study(study)) from None
    if not isinstance(status, dict) or not {"study", "state", "trials", "running"} <= status.keys():
        raise Damaged(f"{study / 'status.json'}: not the status of a study")
    return status | {"state": "interrupted"} if status["state"] == "running" and _driver_gone(status) else status


def _no_study(study: Path) -> str:
    what = f"{study} is not a study: it has no status.json" if study.is_dir() else f"{study}: no such directory"
    others = [path.parent.name for path in study.resolve().parent.glob("*/status.json")]
    near = difflib.get_close_matches(study.resolve().name, others, 1)
    hint = f"did you mean {study.parent / near[0]}?" if near else "expected the directory of a study, as in runs/NAME"
    return printable(f"{what}; {hint}")


def _driver_gone(status: dict[str, Any]) -> bool:
    """Whether the process that wrote `status` has ended: known on its own host only."""
    if status["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(status["pid"])
        return process.status() == psutil.STATUS_ZOMBIE or process.create_time() > status["updated"]
    except psutil.NoSuchProcess:
        return True
