"""What a recipe may say of DeepSpeed, and a study on two Ray workers under it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import caution
from orchestrator.plan import check_plans
from orchestrator.recipe import RecipeError, expand
from orchestrator.recipe.deepspeed_schema import OTHERS, OURS, ZERO
from orchestrator.recipe.load import loads
from strategies.contract import PlanError

TEXT = """
study: zero
workload: {data: digits, model: {mlp: {width: 8, depth: 1}}}
engine: {deepspeed: ENGINE}
cluster: {workers: 2}
base: {epochs: 1, batch: 16}
"""
installed = pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed")


def recipe(engine: str, more: str = "") -> Any:
    return loads(TEXT.replace("ENGINE", engine) + more, "zero.yaml")


def problem(engine: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(engine)
    return str(caught.value)


def misspelt(word: str) -> str:
    return f"{word[:-1]}{'x' if word[-1] != 'x' else 'y'}"


@pytest.mark.parametrize("option", ["stage", "bucket_mib", "extra"])
def test_a_misspelt_option_is_told_with_the_right_one(option: str) -> None:
    assert f'unknown key, did you mean "{option}"?' in problem(f"{{{misspelt(option)}: 1}}")


@pytest.mark.parametrize("key", OTHERS)
def test_a_misspelt_key_of_deepspeed_is_refused(key: str) -> None:
    assert f"extra.{misspelt(key)}: DeepSpeed has no such key, did you mean" in problem(
        f"{{extra: {{{misspelt(key)}: 1}}}}"
    )


@pytest.mark.parametrize("key", ZERO)
def test_a_misspelt_key_of_zero_is_refused(key: str) -> None:
    said = problem(f"{{extra: {{zero_optimization: {{{misspelt(key)}: 1}}}}}}")
    assert f"engine.deepspeed.extra.zero_optimization.{misspelt(key)[:20]}" in said  # long names are cut short
    assert "DeepSpeed has no such key, did you mean" in said


@pytest.mark.parametrize("name", OURS)
def test_what_the_recipe_decides_is_refused_with_its_place(name: str) -> None:
    *way, key = name.split(".")
    inner = f"{{{key}: 1}}"
    for outer in way:
        inner = f"{{{outer}: {inner}}}"
    assert f"extra.{name}: not for extra: {OURS[name]}" in problem(f"{{extra: {inner}}}")


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("{stage: 4}", "expected one of 0, 1, 2, 3, got number 4"),
        ("{bucket_mib: 0}", "expected > 0, got 0"),
        ("{extra: {communication_data_type: auto}}", "DeepSpeed itself knows no auto: leave it out"),
        ("{extra: {zero_optimization: 2}}", "extra.zero_optimization: expected a map"),
    ],
)
def test_wrong_values_are_refused(engine: str, said: str) -> None:
    assert said in problem(engine)


def test_the_batch_is_derived_from_the_recipes_alone() -> None:
    """What DeepSpeed asks for is consistent at each number of workers, and nothing of it is a user's to state."""
    from cluster.engines.deepspeed import configuration

    for workers in range(1, 9):
        own = configuration(2, 100, workers, "fp32", {})
        parts = own["train_micro_batch_size_per_gpu"] * own["gradient_accumulation_steps"] * workers
        assert own["train_batch_size"] == parts


def test_extra_is_merged_and_never_wins() -> None:
    from cluster.engines.deepspeed import configuration

    own = configuration(
        3, 100, 2, "bf16", {"zero_optimization": {"stage": 0, "overlap_comm": True}, "dump_state": True}
    )
    assert own["zero_optimization"]["stage"] == 3 and own["zero_optimization"]["overlap_comm"] is True
    assert own["dump_state"] is True and own["torch_autocast"]["dtype"] == "bfloat16"


def test_a_trial_is_named_after_extra_but_not_after_the_engine() -> None:
    zero, ddp = recipe("{stage: 2}"), loads(TEXT.replace("{deepspeed: ENGINE}", "ddp"), "zero.yaml")
    extra = recipe("{stage: 2, extra: {zero_optimization: {zero_quantized_gradients: true}}}")
    names = [expand(r, "data", "fp32")[0].id for r in (zero, ddp, extra)]
    assert names[0] == names[1] != names[2]


def test_double_precision_is_refused() -> None:
    with pytest.raises(PlanError, match="keeps weights in float32, precision is fp64"):
        check_plans(recipe("{stage: 1}", "precision: fp64\n"))


def test_a_strategy_that_the_stage_cannot_serve_is_refused_before_the_run() -> None:
    with pytest.raises(PlanError, match=r"stage 1 lacks LAYER_GRADS: use engine solo or ddp or deepspeed stage 0$"):
        check_plans(recipe("{stage: 1}", "strategies: [lars]\n"))


def test_extra_brings_a_warning_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "zero.yaml"
    for engine, warned in (
        ("{stage: 2}", ""),
        ("{extra: {dump_state: true}}", "zero.yaml:4:29: engine.deepspeed.extra"),
    ):
        file.write_text(TEXT.replace("ENGINE", engine))
        caution(file, None)
        said = capsys.readouterr().err
        assert warned in said and bool(said) is bool(warned)


@installed
def test_the_names_are_those_of_the_version_that_is_installed() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    ours = [name.partition(".")[2] for name in OURS if name.startswith("zero_optimization.")]
    assert {f.alias or name for name, f in DeepSpeedZeroConfig.model_fields.items()} == {*ZERO, *ours}


@installed
@pytest.mark.slow
def test_a_killed_rank_under_zero_2(tmp_path: Path) -> None:
    """kill -9 of a rank in mid-trial: a new gang goes on from the checkpoint, to the weights that DDP ends with."""
    pytest.importorskip("ray", reason="Ray is not installed")
    import numpy as np
    from safetensors.numpy import load_file

    from tests.orchestrator.test_study_on_ray import Running

    def final(running: Running) -> dict[str, Any]:
        (file,) = running.phases.glob("*/weights.safetensors")
        return load_file(file)

    shape = "{workers: 2, timeout: 60}"
    running = Running(tmp_path / "zero", epochs=8, cluster=f"{shape}\nengine: {{deepspeed: {{stage: 2}}}}")
    running.wait_for_step(200)
    running.ranks()[1].kill()
    code, err = running.end()
    assert code == 0, err
    assert "was lost" in err and [e["attempt"] for e in running.events("trial_started")] == [1, 2]
    (result,) = running.results().values()
    assert result["status"] == "done" and result["steps"] == running.rows()[-1]["step"]
    ddp = Running(tmp_path / "ddp", epochs=8, cluster=shape)
    assert ddp.end()[0] == 0
    assert final(running).keys() == final(ddp).keys()
    for name, value in final(ddp).items():
        np.testing.assert_allclose(final(running)[name], value, rtol=0, atol=1e-3)
    for zero, plain in zip(running.rows(), ddp.rows(), strict=True):
        assert zero["step"] == plain["step"] and abs(zero["train_loss"] - plain["train_loss"]) < 1e-4
