"""Files of a study that are damaged: named, never guessed at, and the way out is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.driver import drive
from orchestrator.files import Damaged
from orchestrator.store import Store
from tests.orchestrator.small_study import RECIPE, study


def damaged(runs: Path) -> str:
    with pytest.raises(Damaged) as error:
        drive(study(runs))
    return str(error.value)


@pytest.mark.usefixtures("no_report")
def test_damaged_files_are_named_and_nothing_is_made_up_for_them(runs: Path) -> None:
    drive(study(runs))
    trial = study(runs).trials[0].id
    folder = runs / "small/trials" / trial
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for name, content in (
        ("result.json", b"{}"),
        ("result.json", b""),
        ("metrics.jsonl", b""),
        ("metrics.jsonl", b"{}\n"),
    ):
        (folder / name).write_bytes(content)
        assert name in (said := damaged(runs)) and said.endswith(f"remove {folder} to train the trial again")
        assert name == "result.json" or (folder / "result.json").read_bytes() == whole["result.json"]
        (folder / name).write_bytes(whole[name])
    (folder / "metrics.jsonl").unlink()
    assert "does not reach step " in damaged(runs)
    shutil.rmtree(folder)
    assert drive(study(runs)) == 0 and Store(runs / "small").finished(trial)


@pytest.mark.parametrize("content", [b"", b"[]", b"a: [", b"\0\xff"])
@pytest.mark.usefixtures("no_report")
def test_a_damaged_recipe_on_file_is_told_and_a_damaged_status_is_no_matter(runs: Path, content: bytes) -> None:
    text = RECIPE.replace("seeds: 2", "seeds: 1")
    drive(study(runs, text=text))
    (runs / "small/status.json").write_bytes(content)
    assert drive(study(runs, text=text)) == 0
    (runs / "small/resolved.yaml").write_bytes(content)
    with pytest.raises(Damaged, match=r"resolved\.yaml: damaged"):
        drive(study(runs, text=text))


@pytest.mark.parametrize("content", ["5", "{}", "[5]", "null"])
@pytest.mark.parametrize("command", ["show", "report"])
def test_a_damaged_list_of_trials_is_one_line(tmp_path: Path, content: str, command: str) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials.json").write_text(content)
    done = CliRunner().invoke(app, [command, str(tmp_path)])
    assert done.exit_code == 2 and done.stderr.startswith(f"{tmp_path / 'trials.json'}: not a list of trials")
