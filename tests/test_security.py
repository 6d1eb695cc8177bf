"""What SECURITY.md promises, a test each."""

from __future__ import annotations

import ast
import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from typer.testing import CliRunner

from orchestrator import checkpoint
from orchestrator.cli import app
from orchestrator.environment import redact, redact_text
from orchestrator.phases import PhaseStore, Record
from orchestrator.progress import Progress
from orchestrator.recipe import RecipeError
from orchestrator.recipe.choices import Name
from orchestrator.recipe.load import loads
from orchestrator.run_trial import rank_log
from orchestrator.store import Store
from orchestrator.terminal import say, shown
from tests.wandb_file import payloads

ROOT = Path(__file__).parents[1]
PRODUCT = [
    p for name in ("orchestrator", "cluster", "strategies", "kernels") for p in sorted((ROOT / name).rglob("*.py"))
]
CANARY = "canary5eedf00d"

# ------------------------------------------------------------------------------------------------ code out of files

# Where pickles are read: torchrun's store, between the ranks of one torchrun; and official CIFAR-10 files, by an
# unpickler that makes plain arrays and refuses everything else.
PICKLES = {"cluster/torchrun.py", "orchestrator/workloads/cifar10.py"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}


def name_of(node: ast.expr) -> str:
    """`torch.load` for that expression."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str) -> Iterator[str]:
    """What in a module could run code that a file holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (
                n for n in names if n.split(".")[0] in {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
            )
        if isinstance(node, ast.Call):
            called, options = name_of(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called in RUNS_CODE:
                yield called
            if called == "torch.load" and options.get("weights_only") != "True":
                yield called
            if called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
                yield called
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"):
                yield called
            if options.get("shell", "False") != "False":
                yield f"{called}(shell)"


def test_no_module_reads_what_could_run_code() -> None:
    found = {str(p.relative_to(ROOT)): sorted(set(dangers(p.read_text()))) for p in PRODUCT}
    assert {file: what for file, what in found.items() if what} == {file: ["pickle"] for file in PICKLES}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from cloudpickle import loads", "eval('1')", "torch.load(f)", "torch.load(f, weights_only=False)",
     "np.load(f, allow_pickle=True)", "yaml.load(f)", "subprocess.run(c, shell=True)"],
)  # fmt: skip
def test_the_search_finds(source: str) -> None:
    assert list(dangers(source))


class Bomb:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def put_pickle(tensors: Path, checksums: Path) -> Path:
    """In the place of a file of tensors, its checksum put right. What there would be if it were read as a pickle."""
    mark, old = tensors.with_name("went off"), tensors.read_bytes()
    bomb = pickle.dumps(Bomb(mark))
    tensors.write_bytes(bomb)
    before = checksums.read_text()
    checksums.write_text(before.replace(*[hashlib.sha256(blob).hexdigest() for blob in (old, bomb)]))
    assert checksums.read_text() != before
    return mark


def test_a_pickle_in_the_place_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """And the one before it is used."""
    folders = [checkpoint.save(tmp_path, step, {"weights": {"a": torch.full((2,), step)}}) for step in (1, 2)]
    mark = put_pickle(folders[1] / "tensors.safetensors", folders[1] / "manifest.json")
    with pytest.warns(UserWarning, match="step_000000002: damaged checkpoint passed over"):
        found = checkpoint.load(tmp_path)
    assert found and found["weights"]["a"].tolist() == [1, 1] and not mark.exists()


def test_a_pickle_in_the_place_of_a_phase_is_refused(tmp_path: Path) -> None:
    store, record = PhaseStore(tmp_path), Record({"a": torch.ones(2)}, [{"step": 1}], {"steps": 1})
    store.put("phase", record)
    mark = put_pickle(tmp_path / "phase" / "weights.safetensors", tmp_path / "phase" / "record.json")
    with pytest.warns(UserWarning, match="damaged phase passed over"):
        assert store.get("phase") is None
    assert not mark.exists()


def test_a_recipe_names_code_only_if_that_is_allowed() -> None:
    text = "study: s\nworkload: {data: digits, model: {import: 'os:system'}}\nbase: {epochs: 1, batch: 8}\n"
    with pytest.raises(RecipeError, match="names code to import"):
        loads(text, "r.yaml")


@pytest.mark.parametrize(
    "text", ["study: !!python/object/apply:os.system ['id']", "a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]"]
)
def test_yaml_makes_plain_values_only(text: str) -> None:
    with pytest.raises(RecipeError):
        loads(text, "r.yaml")


# ------------------------------------------------------------------------------------------------------------- names

names = TypeAdapter(Name)


@given(
    st.text()
    | st.sampled_from(["..", ".", "../x", "/etc", "a/b", "a\\b", "\x1b[31m", "a\n", "", "~", ".hidden", "con\x00"])
)
def test_a_name_is_one_folder_in_the_runs_directory(text: str) -> None:
    try:
        name = names.validate_python(text)
    except ValidationError:
        return
    path = PurePosixPath("/runs") / name
    assert path.parent == PurePosixPath("/runs") and path.name == name and name not in ("", ".", "..")
    assert name.isprintable() and not name.startswith((".", "-", "~"))


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True))
def test_plain_names_are_names(text: str) -> None:
    assert names.validate_python(text) == text


def test_no_key_of_a_recipe_takes_a_path_to_write_to() -> None:
    """The study's name alone says where results go, below --output."""
    text = "study: ../../outside\nworkload: {data: digits, model: mlp}\nbase: {epochs: 1, batch: 8}\n"
    with pytest.raises(RecipeError, match="study"):
        loads(text, "r.yaml")


# ---------------------------------------------------------------------------------------------------------- terminal

STEERING = "\x1b]0;title\x07\x1b[2J\x9b31m\u202ename\u200b"


def steers(text: str) -> bool:
    return any(not c.isprintable() and c not in "\n\t" for c in text)


@given(st.text())
def test_nothing_that_is_shown_steers_a_terminal(text: str) -> None:
    assert not steers(shown(text)) and shown(shown(text)) == shown(text)


def test_words_for_people_do_not_steer(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{STEERING}\nsecond line")
    assert not steers(capsys.readouterr().err)


@pytest.mark.parametrize("command", [["validate"], ["plan"], ["run"], ["show", "--resolved"], ["status"], ["report"]])
def test_errors_about_a_file_do_not_steer(command: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / f"{STEERING}.yaml"
    recipe.write_text(f'study: "{STEERING}"\n{STEERING}: 1\n'.replace("\x1b", "\\x1b"))
    for target in (recipe, tmp_path / STEERING):
        told = CliRunner().invoke(app, [*command, str(target)])
        assert told.exit_code and told.output and not steers(told.output), repr(told.output)


def test_a_result_does_not_steer(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"trial": "x", "arm": STEERING, "batch": 1, "seed": 0, "status": "failed", "error": STEERING}
    status = {"trials": {"total": 1, "running": 0, "left": 0}, "eta_seconds": None}
    with Progress() as view:
        view.ended(result, status)
    told = capsys.readouterr().err
    assert "FAILED" in told and not steers(told)


# ----------------------------------------------------------------------------------------------------------- secrets


def test_secrets_in_text_that_people_write() -> None:
    given = f"""
# my api_key: {CANARY}, do not tell
path: https://me:{CANARY}@host/data.npz
"password": "{CANARY} with words"
command: run --token={CANARY}
num_tokens: 12
"""
    kept = redact_text(given)
    assert CANARY not in kept and "words" not in kept and "num_tokens: 12" in kept and "@host/data.npz" in kept


@pytest.mark.parametrize(
    "value",
    [f"ab,{CANARY}", f"ab}}{CANARY}", rf'"ab\"{CANARY}"', f"'it''s-{CANARY}'", f'"ab\n{CANARY}"', f"\n    {CANARY}",
     f"|\n    {CANARY}\n\n    {CANARY}", f">-\n      {CANARY}", f"\n  - ab\n  - {CANARY}", f"{{\n{CANARY}}}",
     f"ab\r\n    {CANARY}"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["password: ", '"api_key": ', r"x: {\"token\": ", "- secret: "])
def test_a_secret_is_hidden_to_its_end(key: str, value: str) -> None:
    """However it is quoted and wherever it ends; what comes after it stays."""
    kept = redact_text(f"a:\n  {key}{value}\n  rest: 1\n")
    assert kept.startswith(f"a:\n  {key.rstrip()}") and kept.endswith("***\n  rest: 1\n") and CANARY not in kept


def test_a_secret_in_a_comment_ends_with_the_comment() -> None:
    given = f"# api_key:\n#   {CANARY}\n# more\n    batch: 8\n# token: {CANARY}\n    epochs: 1\n"
    assert redact_text(given) == "# api_key:***\n# more\n    batch: 8\n# token: ***\n    epochs: 1\n"


def test_the_user_part_of_a_url_ends_with_its_last_at() -> None:
    assert redact(f"get https://user:pa@{CANARY}@host/a@b") == "get https://***@host/a@b"


def test_the_value_of_a_secret_variable_is_hidden_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    monkeypatch.setenv("SHORT_TOKEN", "no")  # what is this short stands in many a word
    assert redact({"error": [f"refused: {CANARY}", "not now"]}) == {"error": ["refused: ***", "not now"]}


def test_what_a_rank_prints_and_what_the_store_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    with pytest.raises(ValueError, match="s3"), rank_log(tmp_path / "rank_0.log"):
        print("key", os.environ["SOME_API_KEY"])
        raise ValueError(f"s3://me:{CANARY}@bucket")
    store = Store(tmp_path)
    (tmp_path / "trials" / "t").mkdir(parents=True)
    store.commit({"trial": "t", "error": CANARY})
    store.journal("worker_lost", reason=CANARY)
    store.write_status({"state": CANARY})
    assert_absent(CANARY, tmp_path)
    assert "key ***" in (tmp_path / "rank_0.log").read_text()


def assert_absent(secret: str, folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes() + str(path).encode()
        assert secret.encode() not in content, path
        if path.suffix == ".wandb":
            assert not any(secret.encode() in payload for payload in payloads(path.read_bytes())), path


RECIPE = f"""
# token: {CANARY}a
study: canary
workload: {{data: {{npz: {{path: "https://me:{CANARY}b@host/data.npz"}}}}, model: {{mlp: {{width: 8, depth: 1}}}}}}
base: {{steps: 3, batch: 8}}
cluster: {{launcher: solo}}
engine: solo
tracking: {{wandb: {{mode: offline}}}}
"""


def test_a_planted_secret_is_nowhere_in_the_study(tmp_path: Path) -> None:
    """In environment, recipe, URL and command line, through a real run with W&B offline, and a second run of it."""
    pytest.importorskip("wandb")
    data = tmp_path / "https:" / f"me:{CANARY}b@host" / "data.npz"  # the path that such a URL is
    data.parent.mkdir(parents=True)
    x, y = np.random.default_rng(0).normal(size=(32, 4)).astype("f4"), np.arange(32) % 2
    np.savez(data, train_x=x, train_y=y, test_x=x, test_y=y)
    (tmp_path / "r.yaml").write_text(RECIPE)
    planted = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "BIGBATCH_PASSWORD", "DATABASE"), f"{CANARY}c")
    places = {"BIGBATCH_DATA": str(tmp_path), "BIGBATCH_HOME": str(tmp_path / "home")}
    places |= {"NETRC": str(tmp_path / "netrc"), "WANDB_MODE": "offline"}
    runs = tmp_path / "runs"
    options = [
        "-o",
        str(runs),
        "--set=base.rate.peak=0.01",
        f"--set=workload.data.npz.path=https://me:{CANARY}b@host/data.npz",
        "--set",
        f"engine.deepspeed.extra={{comet: {{api_key: {CANARY}d}}}}",
        "--set=engine=solo",  # after all
    ]
    command = [sys.executable, "-m", "orchestrator", "run", str(tmp_path / "r.yaml"), *options]
    for _ in range(2):
        ran = subprocess.run(
            command, env={**os.environ, **planted, **places}, capture_output=True, text=True, timeout=120
        )
        assert ran.returncode == 0, ran.stderr
    assert list(runs.glob("canary/wandb/*/*.wandb")) and (runs / "canary" / "report.html").exists()
    assert_absent(CANARY, runs)


# -------------------------------------------------------------------------------------------------------------- Ray

HOST = """
import os
import grpc
import psutil
from cluster.session import connect, disconnect, ray
from orchestrator.doctor.ray_cluster import answer, is_dashboard, is_loopback

def ask(token):
    call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
    try:
        call(b"", metadata=[("authorization", f"Bearer {token}")] if token else None, timeout=20)
        return "let in"
    except grpc.RpcError as error:
        return error.code().name

connect(1)
family = psutil.Process().children(recursive=True)
sockets = [(p.pid, s.laddr) for p in family for s in p.net_connections("tcp") if s.status == psutil.CONN_LISTEN]
assert sockets and all(is_loopback(at[0]) for _, at in sockets), sockets
assert not any(answer(*at) == 200 for pid, at in sockets if is_dashboard(pid))
channel = grpc.insecure_channel(ray.get_runtime_context().gcs_address)
print(ask(None), ask("f" * 64), ask(os.environ["RAY_AUTH_TOKEN"]), sep=", ")
disconnect()
"""


def test_a_cluster_that_we_start_is_on_loopback_and_asks_for_its_token(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}  # which does not count
    ran = subprocess.run([sys.executable, "-c", HOST], env=environment, capture_output=True, text=True, timeout=100)
    assert ran.stdout == "UNAUTHENTICATED, UNAUTHENTICATED, let in\n", ran.stderr
