"""Collection of phases and features that no study refers to: nothing more, nothing less, never beside a running study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.files import Damaged
from orchestrator.garbage import collect
from orchestrator.store import Busy, Store

A, B, C, D = (letter * 64 for letter in "abcd")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Phases A to D with features of A; the study uses A with its features, one moved aside uses B."""
    for name in (A, f"{A}.exact", B, C, f"{C}.uint8", D, f".{D}.123"):
        folder = tmp_path / ".phases" / name
        folder.mkdir(parents=True)
        (folder / "content").write_bytes(b"x" * 1000)
    for study, names in (("study", [A, f"{A}.exact"]), ("study.old1", [B])):
        trial = tmp_path / study / "trials" / "0123456789ab"
        trial.mkdir(parents=True)
        (trial / "phases.json").write_text(json.dumps(names))
    (tmp_path / "notes").mkdir()
    return tmp_path


def there(runs: Path) -> set[str]:
    return {path.name for path in (runs / ".phases").iterdir()}


def test_dry_by_default(runs: Path) -> None:
    before = there(runs)
    found = collect(runs, delete=False)
    assert [(u.path.name, u.bytes, u.kind) for u in found] == [
        (f".{D}.123", 1000, "part"), (C, 1000, "phase"), (f"{C}.uint8", 1000, "features"), (D, 1000, "phase"),
    ]  # fmt: skip
    assert there(runs) == before


def test_what_no_study_uses_is_deleted(runs: Path) -> None:
    assert len(collect(runs, delete=True)) == 4
    assert there(runs) == {A, f"{A}.exact", B}
    assert collect(runs, delete=True) == []


def test_signs_of_killed_drivers_go_too(runs: Path) -> None:
    sign = runs / ".driver-0123456789abcdef"
    sign.touch()
    with Store(runs / "study").lock(), pytest.raises(Busy):
        collect(runs, delete=True)
    collect(runs, delete=False)
    assert sign.exists()
    collect(runs, delete=True)
    assert not sign.exists()


def test_nothing_is_deleted_beside_a_running_study(runs: Path) -> None:
    with Store(runs / "study.old1").lock(), pytest.raises(Busy):
        collect(runs, delete=True)
    assert len(there(runs)) == 7
    with Store(runs / "study").lock():
        assert len(collect(runs, delete=False)) == 4


def test_a_list_that_cannot_be_read_deletes_nothing(runs: Path) -> None:
    (runs / "study" / "trials" / "0123456789ab" / "phases.json").write_text("{}")
    with pytest.raises(Damaged, match="not a list of names"):
        collect(runs, delete=True)
    assert len(there(runs)) == 7


def test_the_command(runs: Path) -> None:
    def bigbatch(*words: str) -> Result:
        return CliRunner().invoke(app, words)

    dry = bigbatch("gc", str(runs))
    assert dry.exit_code == 0 and "4,000  bytes in 4 folders" in dry.stdout and "--delete" in dry.stdout
    assert bigbatch("gc", str(runs), "--delete").stdout.rstrip().endswith("deleted")
    assert "nothing to delete" in bigbatch("gc", str(runs)).stdout
    missing = bigbatch("gc", str(runs / "none"))
    assert missing.exit_code == 2 and missing.stderr == f"{runs / 'none'}: no such folder\n"
