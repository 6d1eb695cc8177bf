"""The command line as typed: exit codes, what goes to stdout, errors in one line, and how little is imported."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli import app

RECIPES = Path(__file__).parents[2] / "recipes"

FIVE_MISTAKES = """\
study: five
workload:
  data: digit
  target: {test_accuracy: 1.5}
base:
  optimzer: sgd
  epochs: "20"
  batch: 64
arms: {sgd: {}}
seeds: 0
"""


def bigbatch(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)


def invoke(*words: str) -> Result:
    """The same in this process."""
    return CliRunner().invoke(app, words)


def test_five_mistakes_five_positions(tmp_path: Path) -> None:
    path = tmp_path / "five.yaml"
    path.write_text(FIVE_MISTAKES)
    done = bigbatch("validate", str(path))
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.removeprefix(f"{path}:").split(" ")[0] for line in lines] == [
        "3:9:",
        "4:27:",
        "6:3:",
        "7:11:",
        "10:8:",
    ]
    assert 'did you mean "digits"' in lines[0] and 'did you mean "optimizer"' in lines[2]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(recipe: Path) -> None:
    done = bigbatch("validate", str(recipe))
    assert done.returncode == 0, done.stderr


def test_plan_tells_the_arithmetic_and_writes_no_study(tmp_path: Path) -> None:
    done = bigbatch("plan", str(RECIPES / "quickstart.yaml"), "--json", cwd=tmp_path)
    data = json.loads(done.stdout)
    assert data["done"] == 0 and data["offers"] == [
        "EDIT_WEIGHTS",
        "LAYER_GRADS",
        "LAYER_WEIGHTS",
        "OPEN_MODEL",
        "ROLES",
    ]
    for setting in data["settings"]:
        assert setting["workers"] * setting["micro_batch"] * setting["accumulation"] >= setting["batch"]
    assert list(tmp_path.iterdir()) == []


def test_accumulation_in_the_plan(tmp_path: Path) -> None:
    sets = ("--set", "base.micro_batch=8", "--set", "grid.base.batch=[64]")
    done = bigbatch("plan", str(RECIPES / "quickstart.yaml"), "--json", *sets, cwd=tmp_path)
    setting = json.loads(done.stdout)["settings"][0]
    assert (setting["workers"], setting["micro_batch"], setting["accumulation"]) == (2, 8, 4)


MODULES = """
study: modules
workload: {data: digits, model: {mlp: {width: 16, depth: 4}}}
engine: ddp
base: {epochs: 1, batch: 64}
strategies: [{delayed_gradient: {cuts: [2], ahead: 1}}]
"""


@pytest.mark.parametrize(("workers", "replicas", "micro"), [(2, 1, 64), (4, 2, 32)])
def test_modules_on_workers_of_their_own_share_no_batch(
    tmp_path: Path, workers: int, replicas: int, micro: int
) -> None:
    path = tmp_path / "modules.yaml"
    path.write_text(MODULES)
    sets = ("--set", f"cluster.workers={workers}")
    (setting,) = json.loads(invoke("plan", str(path), "--json", *sets).stdout)["settings"]
    told = [setting[key] for key in ("workers", "roles", "replicas", "micro_batch", "accumulation")]
    assert told == [workers, 2, replicas, micro, 1]
    text = invoke("plan", str(path), *sets, "--set", "base.micro_batch=16").stdout
    assert f"64 = {replicas} x 16 x {micro // 16}" in text and "ROLES on 2 roles" in text


@pytest.mark.parametrize(
    "words", [("validate", "R"), ("plan", "R"), ("show", "R", "--resolved"), ("schema",), ("strategies",), ("--help",)]
)
def test_answers_without_torch_or_ray(words: tuple[str, ...], tmp_path: Path) -> None:
    arguments = [str(RECIPES / "quickstart.yaml") if w == "R" else w for w in words]
    script = (
        "import sys, atexit\n"
        "heavy = {'torch', 'ray', 'wandb', 'sklearn', 'matplotlib'}\n"
        "atexit.register(lambda: print('HEAVY', *sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = ['bigbatch', *{arguments!r}]\n"
        "from orchestrator.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "HEAVY"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "nowhere.yaml"), "nowhere.yaml"),
        (("show", "."), "not a study directory"),
        (("show", ".", "--json"), "not a study directory"),
        (("report", "."), "not a study directory"),
        (("status", "."), "study"),
        (("init", "--from", "quickstrat"), "quickstart"),
        (("init", "no/such/folder.yaml"), "No such file or directory"),
    ],
)
def test_what_a_user_does_wrong_is_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = bigbatch(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


TWO_PLANS = """\
study: two
workload: {data: digits, model: mlp}
engine: {deepspeed: {stage: 2}}
base: {epochs: 1, batch: 64}
arms:
  a: {strategies: [muon]}
  b: {strategies: [local_loss]}
  c: {}
grid: {base.batch: [64, 128]}
"""


def test_every_arm_that_cannot_be_is_told_once_at_its_place(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(TWO_PLANS)
    done = invoke("validate", str(path))
    one, two = done.stderr.splitlines()
    assert done.exit_code == 2
    assert one.startswith(f"{path}:6:6: arms.a: the plan needs LAYER_GRADS; engine deepspeed stage 2 lacks")
    assert two.startswith(f"{path}:7:6: arms.b: the plan needs OPEN_MODEL; engine deepspeed stage 2 lacks")
    done = invoke("run", str(path), "--output", str(tmp_path / "runs"))
    assert done.exit_code == 2 and [line[:7] for line in done.stderr.splitlines()] == ["arms.a:", "arms.b:"]


@pytest.mark.parametrize(
    ("words", "started"),
    [
        (("run",), "orchestrator.driver.drive"),
        (("submit", "--address", "http://nowhere"), "orchestrator.submit.submit"),
    ],
)
def test_cautions_come_before_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], started: str
) -> None:
    monkeypatch.setattr(started, lambda *study, **options: 0)
    path = tmp_path / "extra.yaml"
    path.write_text(TWO_PLANS[: TWO_PLANS.index("arms:")])
    done = invoke(*words, str(path), "--set", "engine.deepspeed.extra={wall_clock_breakdown: true}")
    assert done.exit_code == 0, done.stderr
    assert "warning: goes to DeepSpeed as it is, untested: wall_clock_breakdown" in done.stderr


def test_missing_data_is_told_before_any_worker_is_taken(tmp_path: Path) -> None:
    done = bigbatch("run", str(RECIPES / "quickstart.yaml"), "--set", "workload.data=mnist", cwd=tmp_path)
    assert done.returncode == 2 and "train-images-idx3-ubyte" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "quickstart" / "journal.jsonl").exists()


def test_damaged_data_are_told_before_any_worker_is_taken(tmp_path: Path) -> None:
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    data = f"workload.data={{npz: {{path: {tmp_path / 'cut.npz'}}}}}"
    done = bigbatch("run", str(RECIPES / "smoke.yaml"), "--set", data, cwd=tmp_path)
    assert (
        done.returncode == 2 and "cut.npz: truncated or corrupt" in done.stderr and len(done.stderr.splitlines()) == 1
    )
    assert not (tmp_path / "runs").exists()


def test_folders_of_the_same_names_do_no_harm(tmp_path: Path) -> None:
    for name in ("cluster", "orchestrator", "strategies"):
        (tmp_path / name).mkdir()
    command = [Path(sys.executable).with_name("bigbatch"), "run", RECIPES / "smoke.yaml", "--allow-code"]
    command += ["--set", "cluster={launcher: solo, workers: 1}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/smoke/wandb_mirror.log").read_text() == ""


def test_a_file_in_the_place_of_the_runs_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    done = bigbatch("run", str(RECIPES / "smoke.yaml"), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "runs/smoke: Not a directory\n"


def test_several_workers_without_ray_is_one_line(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['ray'] = None\n"
        f"sys.argv = ['bigbatch', 'run', {str(RECIPES / 'smoke.yaml')!r}, '--set', 'tracking={{}}']\n"
        "from orchestrator.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert 'pip install "bigbatch[ray]"' in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_report_of_a_study_is_of_the_recipe_as_it_was_last_run(tmp_path: Path) -> None:
    recipe = str(RECIPES / "smoke.yaml")
    sets = ("--set", "cluster={launcher: solo, workers: 1}", "--set", "tracking={}")
    for epochs in ("base.epochs=1", "base.epochs=2"):
        last = bigbatch("run", recipe, *sets, "--set", epochs, cwd=tmp_path)
    again = bigbatch("report", "runs/smoke", cwd=tmp_path)
    assert again.stderr.splitlines() == last.stderr.splitlines()[-len(again.stderr.splitlines()) :]
    assert len(bigbatch("show", "runs/smoke", cwd=tmp_path).stdout.splitlines()) == 2


def test_a_batch_smaller_than_the_gang_is_refused() -> None:
    done = bigbatch("validate", str(RECIPES / "quickstart.yaml"), "--set", "grid.base.batch=[1]")
    assert done.returncode == 2 and "base.batch is 1, but each of 2 workers" in done.stderr


def test_compression_with_a_single_worker_is_refused() -> None:
    sets = ("--set", "engine={ddp: {compression: bf16}}", "--set", "cluster.workers=1")
    done = bigbatch("validate", str(RECIPES / "quickstart.yaml"), *sets)
    assert done.returncode == 2 and "compression needs 2 workers or more" in done.stderr


def test_init_writes_a_recipe_that_is_valid(tmp_path: Path) -> None:
    assert bigbatch("init", "mine.yaml", cwd=tmp_path).returncode == 0
    assert bigbatch("validate", "mine.yaml", cwd=tmp_path).returncode == 0
    assert bigbatch("init", "mine.yaml", cwd=tmp_path).returncode == 2


def test_the_schema_that_init_names_is_there(tmp_path: Path) -> None:
    """Of an installed package, too: recipes and schema are in the wheel."""
    assert invoke("init", str(tmp_path / "mine.yaml")).exit_code == 0
    first, rest = (tmp_path / "mine.yaml").read_text().split("\n", 1)
    comment, schema = first.split("$schema=")
    assert comment == "# yaml-language-server: " and (tmp_path / schema).samefile(RECIPES / "recipe.schema.json")
    assert rest == (RECIPES / "quickstart.yaml").read_text().split("\n", 1)[1]


def test_recipes_and_schema_are_packaged() -> None:
    setuptools = tomllib.loads(RECIPES.with_name("pyproject.toml").read_text())["tool"]["setuptools"]
    assert "recipes" in setuptools["packages"]
    assert setuptools["package-data"]["recipes"] == ["*.yaml", "recipe.schema.json"]


def test_show_as_json(tmp_path: Path) -> None:
    recipe = str(RECIPES / "smoke.yaml")
    sets = ("--set", "cluster={launcher: solo, workers: 1}", "--set", "tracking={}")
    assert bigbatch("run", recipe, *sets, cwd=tmp_path).returncode == 0
    results = json.loads(bigbatch("show", "runs/smoke", "--json", cwd=tmp_path).stdout)
    wanted = {"trial", "arm", "batch", "seed", "status", "steps", "epochs", "final", "best", "target", "seconds"}
    assert results and all(wanted | {"examples_per_second", "workers", "device"} <= r.keys() for r in results)


def test_your_own_network_is_found_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\ndef build(inputs, classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    sets = ("--set", "cluster={launcher: solo, workers: 1}", "--set", "tracking={}")
    words = ("run", str(RECIPES / "smoke.yaml"), *sets, "--set", "workload.model={import: 'mynet:build'}")
    refused = bigbatch(*words, cwd=tmp_path)
    assert refused.returncode == 2 and "--allow-code" in refused.stderr
    done = bigbatch(*words, "--allow-code", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
