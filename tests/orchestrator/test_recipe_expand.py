"""From a recipe to its trials, and to a resolved recipe that says the same."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.compose import compose
from orchestrator.recipe import Recipe, RecipeError, dump, expand, load, resolved
from orchestrator.recipe.load import loads
from orchestrator.recipe.resolve import merge
from orchestrator.recipe.workload_schema import Data
from orchestrator.trial import Trial
from strategies.backprop import Backprop
from strategies.contract import PlanError
from strategies.optimizers import AdamW
from strategies.rate import Rate

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TEXT = """\
study: s
workload: {data: digits, evaluate: {steps: 5}, target: {test_accuracy: 0.9}}
base:
  batch: 32
  epochs: 2
  optimizer: {sgd: {momentum: 0.9, nesterov: true}}
  rate: {peak: 0.1, decay: cosine}
strategies: [label_smoothing]
arms:
  plain: {}
  other: {strategies: [ema], base: {optimizer: {sgd: {momentum: 0.5}}, rate: {peak: 1}}}
grid: {base.batch: [32, 8], base.rate.warmup: [0, 1]}
seeds: 2
"""


def recipe(*overrides: str, text: str = TEXT) -> Recipe:
    return loads(text, "recipe.yaml", overrides)


def trials(*overrides: str, text: str = TEXT) -> list[Trial]:
    return expand(recipe(*overrides, text=text), "data", "fp32")


def ids(*overrides: str, text: str = TEXT) -> list[str]:
    return [trial.id for trial in trials(*overrides, text=text)]


def test_arms_come_first_then_the_grid_then_seeds() -> None:
    order = [(t.arm, t.base.batch, t.base.rate.warmup, t.seed) for t in trials()]
    assert order == [(a, b, w, s) for a in ("plain", "other") for b in (32, 8) for w in (0, 1) for s in (0, 1)]
    assert trials()[0].point == {"base.batch": 32, "base.rate.warmup": 0}


def test_an_arm_may_have_a_network_of_its_own() -> None:
    """Which the grid overrides, like all that an arm says."""
    arms = "arms={plain: {}, other: {model: {small_cnn: {width: 4}}, base: {steps: 7}}}"
    networks = [t.workload.model for t in trials(arms, "grid={}", "seeds=1")]
    assert [n.name for n in networks] == ["mlp", "small_cnn"] and networks[1].options.width == 4
    assert networks[1].options.batch_norm
    over = [t.workload.model for t in trials(arms, "grid={workload.model: [{mlp: {width: 9}}]}", "seeds=1")]
    assert [n.name for n in over] == ["mlp", "mlp"]
    assert [t.id for t in trials(arms, "seeds=1")][:4] == ids("seeds=1")[:4]


def test_arms_merge_onto_the_base_and_strategies_of_the_study_come_first() -> None:
    plain, other = trials()[0], trials()[8]
    assert other.base.optimizer.options.model_dump() == {"momentum": 0.5, "nesterov": True, "weight_decay": 0}
    assert (other.base.rate.peak, other.base.rate.decay.name) == (1, "cosine")
    assert plain.strategies == (("label_smoothing", {"amount": 0.1}),)
    assert [name for name, _ in other.strategies] == ["label_smoothing", "ema"]


def test_another_variant_replaces_and_another_unit_too() -> None:
    (trial,) = trials("arms={a: {base: {optimizer: adamw, steps: 7}}}", "grid={}", "seeds=[4]")
    assert trial.base.optimizer.name == "adamw" and trial.base.optimizer.sgd is None
    assert (trial.base.steps, trial.base.epochs, trial.seed) == (7, None, 4)
    (trial,) = trials("arms={a: {}}", "grid={base.steps: [9], workload.evaluate.epochs: [1]}", "seeds=1")
    assert (trial.base.steps, trial.base.epochs) == (9, None)
    assert (trial.workload.evaluate.epochs, trial.workload.evaluate.steps) == (1, None)


def test_a_grid_value_merges_as_an_arm_does() -> None:
    grid = "grid={base.optimizer: [{sgd: {weight_decay: 0.1}}, adamw]}"
    first, second = trials("arms={a: {}}", grid, "seeds=1")
    assert first.base.optimizer.options.model_dump() == {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    assert second.base.optimizer.name == "adamw"
    assert first.point == {"base.optimizer": {"sgd": {"weight_decay": 0.1}}}


def test_precision_is_that_of_the_grid_or_of_the_recipe_or_what_auto_is_here() -> None:
    assert {t.precision for t in trials()} == {"fp32"}
    assert {t.precision for t in trials("precision=fp64")} == {"fp64"}
    assert {t.precision for t in trials("grid.precision=[bf16, fp64]")} == {"bf16", "fp64"}


def test_the_fingerprint_is_asked_once_for_each_data_set() -> None:
    asked: list[str] = []

    def fingerprint(data: Data) -> str:
        asked.append(data.name)
        return f"print of {data.name}"

    found = expand(recipe("grid.workload.data=[digits, mnist]"), fingerprint, "fp32")
    assert sorted(asked) == ["digits", "mnist"]
    assert all(t.data == f"print of {t.workload.data.name}" for t in found)


def test_ids_are_of_what_determines_the_result() -> None:
    base = ids()
    assert len(set(base)) == len(base) == 16 and all(len(i) == 12 for i in base)
    for same in ("study=t", "tracking.wandb={}", "cluster.workers=2", "checkpoint.keep=5", "workload.target=null"):
        assert ids(same) == base, same
    for new in (
        "strategies=[{label_smoothing: {amount: 0.2}}]",
        "grid.base.batch=[16, 64]",
        "seeds=[7, 8]",
        "log_steps=9",
    ):
        assert not set(ids(new)) & set(base), new
    assert set(ids("seeds=3")) > set(base)


def test_ids_do_not_depend_on_the_order_of_keys_or_the_spelling_of_numbers() -> None:
    lines = TEXT.splitlines()
    reordered = "\n".join([*lines[7:], *lines[2:7], lines[1], lines[0]])
    assert ids(text=reordered) == ids()
    assert ids(text=TEXT.replace("peak: 1}", "peak: 1.0}").replace("[32, 8]", "[3.2e1, 8]")) == ids()
    assert ids(text=TEXT.replace("[label_smoothing]", "[{label_smoothing: {amount: 1e-1}}]")) == ids()


def test_ids_are_the_same_in_another_process() -> None:
    code = (
        "import sys; from orchestrator.recipe.load import loads; from orchestrator.recipe import expand; "
        "print(*[t.id for t in expand(loads(sys.stdin.read(), 'r.yaml'), 'data', 'fp32')])"
    )
    done = subprocess.run([sys.executable, "-c", code], input=TEXT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ids()


def test_the_speed_recipe_evaluates_once() -> None:
    """After its last step."""
    (shipped,) = (load(path) for path in SHIPPED if path.stem == "cifar10_speed")
    steps = math.ceil(shipped.base.epochs * 50_000 / shipped.base.batch)
    assert shipped.workload.evaluate.in_steps(50_000, shipped.base.batch) >= steps


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_resolved_recipe_says_the_same(path: Path) -> None:
    first = load(path)
    again = loads(dump(resolved(first)), "resolved.yaml")
    assert again == first and resolved(again) == resolved(first)
    assert expand(again, "d", "fp32") == expand(first, "d", "fp32")


def test_resolved_fills_in_defaults_and_leaves_out_nothing_else() -> None:
    data = resolved(recipe())
    assert data["workload"]["model"] == {"mlp": {"width": 128, "depth": 3}}
    ddp = {"find_unused_parameters": False, "bucket_mib": "auto", "compression": {"none": {}}, "share_memory": True}
    assert data["engine"] == {"ddp": ddp} and data["log_steps"] == 50
    assert data["strategies"] == [{"label_smoothing": {"amount": 0.1}}]
    assert data["arms"]["plain"] == {"strategies": [], "base": {}}
    assert list(data["grid"]) == ["base.batch", "base.rate.warmup"]
    imported = loads(TEXT.replace("digits", "digits, model: {import: 'a:b'}"), "r.yaml", allow_code=True)
    assert resolved(imported)["workload"]["model"] == {"import": "a:b"}


NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z") | st.sampled_from(
    ["1e3", "true", "null", "010", "1.", "no"]
)
RATES = st.fixed_dictionaries(
    {"peak": st.floats(1e-12, 1e12)},
    optional={
        "per": st.integers(1, 10**9),
        "start": st.floats(0, 1),
        "decay": st.sampled_from(["none", "cosine", "step"]),
    },
)
ARMS = st.dictionaries(
    NAMES,
    st.fixed_dictionaries(
        {}, optional={"base": st.fixed_dictionaries({}, optional={"rate": RATES, "steps": st.integers(1, 99)})}
    ),
    min_size=1,
    max_size=3,
)


@given(
    study=NAMES,
    path=st.text(),
    base=st.fixed_dictionaries(
        {"batch": st.integers(1, 10**6), "epochs": st.floats(0.001, 1e6)}, optional={"rate": RATES}
    ),
    arms=ARMS,
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
)
def test_any_recipe_survives_being_resolved_and_dumped(
    study: str, path: str, base: dict[str, Any], arms: dict[str, Any], seeds: list[int]
) -> None:
    workload = {"data": {"npz": {"path": path}}}
    first = Recipe.model_validate({"study": study, "workload": workload, "base": base, "arms": arms, "seeds": seeds})
    again = Recipe.model_validate(_read(dump(resolved(first))))
    assert again == first
    assert expand(again, "d", "fp32") == expand(first, "d", "fp32")


def _read(text: str) -> Any:
    from orchestrator.recipe.yaml_nodes import read

    document = read(text, "resolved.yaml")
    assert document.problems == []
    return document.data


def test_merging_an_empty_patch_changes_nothing() -> None:
    data = resolved(recipe())
    assert merge(Recipe, data, {}) == data and merge(Recipe, data, data) == data


def test_how_a_batch_is_shared_out_is_part_of_a_name_only_where_it_matters() -> None:
    adascale = "arms.other.strategies=[{adascale: {per: 8}}]"
    plain, other = slice(0, 8), slice(8, 16)
    one, two = ids(adascale, "cluster.workers=1"), ids(adascale, "cluster.workers=2")
    assert one[plain] == two[plain] and not set(one[other]) & set(two[other])


def test_adam_sde_scales_the_whole_optimizer() -> None:
    adam = ("base.optimizer=adamw", "arms.other.base={}", "base.rate={peak: 0.1, per: 32, scale: adam_sde}")
    large = compose(trials(*adam, "grid={base.batch: [32, 128]}")[2], examples=1000).phases[0].learner
    assert isinstance(large, Backprop) and isinstance(large.optimizer, AdamW) and isinstance(large.rate, Rate)
    told = (large.rate.peak, large.optimizer.beta1, large.optimizer.beta2, large.optimizer.eps)
    assert told == pytest.approx((0.2, 0.6, 0.996, 0.5e-8), rel=1e-12)


def test_the_noise_scale_sets_the_rate() -> None:
    settings = ("base.rate={peak: 0.1, per: 32, scale: noise_scale, noise_scale: 96}", "grid={base.batch: [32, 96]}")
    rates = [compose(trials(*settings)[i], examples=1000).phases[0].learner.rate.peak for i in (0, 2)]  # type: ignore[attr-defined]
    assert rates == pytest.approx([0.1, 0.2], rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["base.rate.scale=adam_sde"], r"base\.rate\.scale: adam_sde scales adamw, but the optimizer is sgd"),
        (["base.rate.scale=noise_scale"], r"base\.rate\.scale: .*give both or neither"),
        (["base.rate.noise_scale=100"], r"base\.rate\.noise_scale: .*give both or neither"),
        (
            ["base.optimizer=adamw", "arms.other.base={}", "base.rate={scale: adam_sde, per: 2}"],
            r"beta1 0\.9 at batch 2 -0\.6 at batch 32, expected > 0: stay below batch 20",
        ),
    ],
)
def test_scaling_rules_that_cannot_be(settings: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(*settings)


def test_a_budget_in_steps_beside_a_method_that_sets_them_is_refused() -> None:
    settings = ("arms.other.strategies=[{adascale: {per: 8}}]", "base.steps=100")
    with pytest.raises(PlanError, match=r"state base\.epochs instead of base\.steps"):
        compose(trials(*settings)[-1], examples=100)


def test_a_scaling_rule_beside_a_method_that_scales_is_refused() -> None:
    settings = ("arms.other.strategies=[{adascale: {per: 8}}]", "base.rate.scale=linear")
    with pytest.raises(PlanError, match=r"base\.rate\.scale is linear: leave it out"):
        compose(trials(*settings)[-1], examples=100)


def test_with_dropout_the_parts_of_a_batch_are_part_of_the_name() -> None:
    """Each worker draws masks of its own, and anew for each micro-batch."""

    def names(model: str) -> list[str]:
        shapes = ("cluster.workers=1", "cluster.workers=2", "base.micro_batch=8")
        sets = (f"workload.model={model}", "arms={plain: {}}", "grid={}", "seeds=1")
        return [name for shape in shapes for name in ids(*sets, shape)]

    for network in ("alexnet", "overfeat", "small_overfeat"):
        assert len({*names(network)}) == 3
        assert len({*names(f"{{{network}: {{dropout: 0}}}}")}) == 1
    assert len({*names("mlp")}) == 1
