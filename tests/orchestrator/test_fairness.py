"""The rule of equal tuning: when it speaks, where, how it is answered, and that the report tells it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.fairness import budgets, has_layerwise, unfair
from orchestrator.recipe import Recipe, cautions, resolved
from orchestrator.recipe.load import loads
from orchestrator.report import build
from tests.orchestrator.made_study import MadeStudy

TEXT = """\
study: s
workload: {data: digits}
base: {batch: 32, epochs: 2, optimizer: {sgd: {momentum: 0.9}}, rate: {peak: 0.1, decay: {polynomial: {power: 2}}}}
arms:
  lars: {strategies: [lars]}
  nesterov: {base: {optimizer: {sgd: {nesterov: true}}}}
  adamw: {base: {optimizer: adamw}}
grid: {base.batch: [32, 64], base.rate.peak: [0.1, 1]}
"""


def recipe(*overrides: str) -> Recipe:
    return loads(TEXT, "recipe.yaml", overrides)


def said(*overrides: str) -> list[tuple[str, str]]:
    return [(".".join(map(str, f.path)), f.message) for f in unfair(recipe(*overrides))]


def test_equally_tuned_baselines_are_fair() -> None:
    assert said() == []
    assert has_layerwise(recipe())
    assert {(c.arm, c.method, c.batch): n for c, n in budgets(recipe()).items()} == {
        (name, name, batch): 2 for name in ("lars", "nesterov", "adamw") for batch in (32, 64)
    }


def test_studies_without_lars_or_lamb_are_none_of_its_business() -> None:
    plain = recipe("arms={sgd: {}}")
    assert unfair(plain) == [] and not has_layerwise(plain)


@pytest.mark.parametrize(
    ("setting", "lacks"),
    [
        ("arms={lars: {strategies: [lars]}}", "no nesterov and no adamw arm"),
        ("arms.adamw.base={optimizer: {sgd: {momentum: 0.5}}}", "no adamw arm"),
        ("arms.nesterov.base={optimizer: {sgd: {nesterov: false, momentum: 0.5}}}", "no nesterov arm"),
        ("arms.adamw.base={optimizer: adamw, rate: {decay: cosine}}", "no adamw arm"),  # another kind of schedule
        ("arms.adamw.strategies=[label_smoothing]", "no adamw arm"),
        ("arms.lars.strategies=[label_smoothing, lars]", "no nesterov and no adamw arm"),
        ("arms.lars={base: {optimizer: adamw}, strategies: [lamb, ema]}", "lamb has no nesterov and no adamw arm"),
    ],
)
def test_lacking_baselines(setting: str, lacks: str) -> None:
    ((path, message),) = said(setting)
    assert path == "arms.lars" and message.startswith("W-UNFAIR: ") and lacks in message
    assert 'unfair: "..."' in message and "\n" not in message


def test_another_budget() -> None:
    space = "space: {base.optimizer.sgd.momentum: {uniform: [0.5, 0.9]}}, allow_unequal: true"
    ((path, message),) = said(f"arms.lars={{strategies: [lars], search: {{points: 5, {space}}}}}")
    assert path == "arms.lars" and "lars is tried at 10 settings, arm nesterov at 2" in message


def test_a_reason_answers() -> None:
    assert said("arms={lars: {strategies: [lars]}}", "unfair=a demonstration") == []


def test_the_reason_has_words() -> None:
    with pytest.raises(ValueError, match="unfair"):
        recipe('unfair=" "')


def test_strategies_of_the_study_are_pointed_at(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT[: TEXT.index("arms:")] + "strategies: [lars]\n")
    (problem,) = cautions(path, [], unfair)
    assert str(problem).startswith(f"{path}:4:13: strategies: W-UNFAIR: lars has no nesterov and no adamw arm")


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_commands_warn_on_stderr_and_go_on(command: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    only = ["--set", "arms={lars: {strategies: [lars]}}"]
    quiet = CliRunner().invoke(app, [command, str(path)])
    warned = CliRunner().invoke(app, [command, str(path), *only])
    silenced = CliRunner().invoke(app, [command, str(path), *only, "--set", "unfair=known"])
    assert (quiet.exit_code, warned.exit_code, silenced.exit_code) == (0, 0, 0)
    (line,) = [line for line in warned.stderr.splitlines() if "W-UNFAIR" in line]
    assert "arms.lars" in line and "W-UNFAIR" not in warned.stdout + quiet.stderr + silenced.stderr


def made(folder: Path, *overrides: str) -> tuple[list[str], str]:
    study = MadeStudy(folder, target=None)
    for arm in ("lars", "nesterov"):
        for peak in (0.1, 1.0):
            study.add(arm, 32, 0, point={"base.batch": 32, "base.rate.peak": peak})
    (folder / "resolved.yaml").write_text(yaml.safe_dump(resolved(recipe(*overrides))))
    return build(folder, study.ids), (folder / "report.md").read_text()


def test_the_report_tells(tmp_path: Path) -> None:
    lacking = "arms={lars: {strategies: [lars]}, nesterov: {base: {optimizer: {sgd: {nesterov: true}}}}}"
    headlines, _ = made(tmp_path / "warned", lacking)
    assert any(line.startswith("W-UNFAIR: lars has no adamw arm") for line in headlines)
    headlines, page = made(tmp_path / "silenced", lacking, "unfair=AdamW is in another study")
    assert "Tuned unequally by intent: AdamW is in another study" in headlines
    assert "W-UNFAIR" not in page
    header = next(line for line in page.splitlines() if "settings tried" in line)
    row = next(line for line in page.splitlines() if line.startswith("| lars "))
    cells = dict(zip(*([c.strip() for c in line.strip("|").split("|")] for line in (header, row)), strict=True))
    assert (cells["trials"], cells["settings tried"]) == ("2", "2")
