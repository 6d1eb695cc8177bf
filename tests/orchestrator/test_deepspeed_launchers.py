"""DeepSpeed under each launcher: the gang's result bit for bit; and run after run that ends in order."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from orchestrator.files import read_json
from tests.orchestrator.test_parity import LIMIT, RECIPE, TORCHRUN, Runner, assert_same, run  # noqa: F401

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed"),
]
STAGES = (1, 2)
REPEATS = 20


def zero(stage: int) -> tuple[str, str]:
    return "--set", f"engine={{deepspeed: {{stage: {stage}}}}}"


@pytest.mark.parametrize("stage", STAGES)
def test_torchrun(run: Runner, stage: int) -> None:  # noqa: F811
    assert_same(run("torchrun", *zero(stage), command=(*TORCHRUN, "orchestrator")), run("gang", *zero(stage)))


@pytest.mark.parametrize("stage", STAGES)
def test_ray_train(run: Runner, stage: int) -> None:  # noqa: F811
    pytest.importorskip("pandas", reason="Ray Train is not installed")
    assert_same(run("ray_train", *zero(stage), "--set", "cluster.launcher=ray_train"), run("gang", *zero(stage)))


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_a_run_ends_in_order(tmp_path: Path, repeat: int) -> None:
    """The process group is left with DeepSpeed's own groups in it, which has been seen to abort now and then: torchrun tells
    of any rank that does. The result is on file, and the exit code is 0."""
    (tmp_path / "parity.yaml").write_text(RECIPE.replace("epochs: 1", "epochs: 0.1").replace("seeds: 2", "seeds: 1"))
    line = [*TORCHRUN, "orchestrator", "run", "parity.yaml", "-o", "runs", *zero(2)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, cwd=tmp_path)
    told = [read_json(file)["status"] for file in tmp_path.glob("runs/parity/trials/*/result.json")]
    assert (told, done.returncode) == (["done"], 0), done.stderr
