from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import environment
from orchestrator.environment import describe, is_secret, redact, redact_command


def test_describes_this_machine_as_json() -> None:
    found = json.loads(json.dumps(describe(), allow_nan=False))
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"] and found["bigbatch"]
    assert 1 <= found["cores"]["usable"] <= found["cores"]["logical"]
    assert found["memory_bytes"] > 1e8 and found["cpu"] and found["os"]


def test_no_secret_of_the_environment_or_command_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-5eed"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "BIGBATCH_PASSWORD", "DATABASE"):
        monkeypatch.setenv(name, canary)
    monkeypatch.setenv("RAY_ADDRESS", f"ray://user:{canary}@head:10001")
    monkeypatch.setenv("BIGBATCH_DATA", f"https://me:{canary}@store/data")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        sys, "argv", ["bigbatch", "run", "--token", canary, f"--set=api_key={canary}", f"s3://k:{canary}@b"]
    )
    found = describe()
    assert canary not in json.dumps(found)
    assert found["variables"]["RAY_ADDRESS"] == "head"
    assert found["variables"]["BIGBATCH_DATA"] == "https://***@store/data"
    assert found["variables"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("address", "host"), [("auto", "auto"), ("10.0.0.1:6379", "10.0.0.1"), ("ray://head:10001", "head")]
)
def test_of_the_ray_address_the_host_is_kept(monkeypatch: pytest.MonkeyPatch, address: str, host: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert describe()["variables"]["RAY_ADDRESS"] == host


SECRETS = (
    "api_key",
    "apikey",
    "WANDB_API_KEY",
    "apiKey",
    "hf-token",
    "token",
    "password",
    "client_secret",
    "--password",
    "aws.secret",
)
PLAIN = ("num_tokens", "tokens", "keep", "key", "monkey", "author", "token_count", "passes", "secretary", "tokenizer")


@pytest.mark.parametrize("name", SECRETS)
def test_named_like_a_secret(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", PLAIN)
def test_not_named_like_a_secret(name: str) -> None:
    assert not is_secret(name)


def test_redact_goes_deep_and_changes_nothing_else() -> None:
    given = {"a": [{"token": "x", "num_tokens": 3}], "url": "see https://me:pw@host/p and http://host", "secret": None}
    assert redact(given) == {
        "a": [{"token": "***", "num_tokens": 3}],
        "url": "see https://***@host/p and http://host",
        "secret": None,
    }


def test_redacted_command_keeps_the_rest() -> None:
    given = ["run", "r.yaml", "--set", "base.epochs=2", "--api-key", "x", "-v", "--token=x", "WANDB_API_KEY=x"]
    shown = ["run", "r.yaml", "--set", "base.epochs=2", "--api-key", "***", "-v", "--token=***", "WANDB_API_KEY=***"]
    assert redact_command(given) == shown


@pytest.mark.parametrize(
    "value", ["{comet: {api_key: canary}}", '{"api_key": "ab,canary", b: 1}', "{api_key:\n canary}"]
)
def test_a_secret_in_a_map_on_the_command_line_is_hidden(value: str) -> None:
    (shown,) = redact_command([f"--set=engine.deepspeed.extra={value}"])
    assert shown.startswith("--set=engine.deepspeed.extra={") and shown.endswith("***") and "canary" not in shown


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe()["git"] is None
    who = ["-c", "user.name=n", "-c", "user.email=e@e"]
    (tmp_path / "a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], [*who, "commit", "-qm", "m"]):
        subprocess.run(["git", *command], check=True)
    clean = describe()["git"]
    assert len(clean["commit"]) == 40 and not clean["dirty"]
    (tmp_path / "a").write_text("2")
    assert describe()["git"] == {"commit": clean["commit"], "dirty": True}


@pytest.mark.parametrize(
    ("torch", "there", "visible", "count"),
    [
        ("2.13.0", "03", None, 2),
        ("2.13.0+cu130", "3", None, 1),  # a container that is given one of many
        ("2.13.0", "", None, 0),
        ("2.13.0", "03", "", 0),
        ("2.13.0", "03", "-1", 0),
        ("2.13.0", "03", "1", 1),
        ("2.13.0", "0123", "2, GPU-5f1c,-1,3", 2),
        ("2.13.0", "0", "0,1,2", 1),
        ("2.13.0+cpu", "03", None, 0),
    ],
)
def test_gpus_that_training_can_use(
    monkeypatch: pytest.MonkeyPatch, torch: str, there: str, visible: str | None, count: int
) -> None:
    monkeypatch.setattr(environment, "_version", lambda package: torch)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: (self / f"nvidia{number}" for number in there))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment.gpu_count() == count


def test_imports_neither_torch_nor_ray_nor_wandb() -> None:
    code = (
        "import sys, orchestrator.environment as e; e.describe(); print({'torch', 'ray', 'wandb'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "set()"


@pytest.mark.parametrize("family, told", [("25", "AMD EPYC (family 25, model 17)"), ("", "AMD EPYC")])
def test_the_processor_is_told_with_family_and_model_where_it_has_them(
    monkeypatch: pytest.MonkeyPatch, family: str, told: str
) -> None:
    facts = {"model name": "AMD EPYC", "cpu family": family, "model": "17"}
    monkeypatch.setattr(environment, "_cpuinfo", facts.__getitem__)
    assert environment.cpu_model() == told
