"""The signal that asks a process where it stands: it answers, wherever it is, and goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys
from cluster import stacks
def here(): os.kill(os.getpid(), stacks.SIGNAL)
stacks.listen()
here()
with open(sys.argv[1], "w") as file, stacks.written_to(file):
    here()
here()
print("alive")
"""
STACK = "(most recent call first)"


def test_stacks_go_to_the_log_of_a_trial_and_else_to_stderr(tmp_path: Path) -> None:
    log, root = tmp_path / "rank_0.log", Path(__file__).parents[2]
    line = [sys.executable, "-c", PROGRAM, str(log)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, cwd=root)
    assert done.stdout == "alive\n", done.returncode
    assert (log.read_text().count(STACK), done.stderr.count(STACK)) == (1, 2)
    assert ", line 4 in here" in log.read_text()
