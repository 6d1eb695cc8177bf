"""Mistakes in recipes: every one told at once, at its place, with the nearest right name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.recipe import Recipe, RecipeError
from orchestrator.recipe.load import loads

NAME = "a name of letters, digits, '_', '.' and '-', at most 64, the first a letter or digit"
MODELS = "mlp, small_cnn, resnet, vgg, airbench, plain_cnn, overfeat, small_overfeat, alexnet, convnext, import"
UNIT = "expected exactly one of base.epochs, base.steps, got"
GOOD = """\
study: s
workload: {data: digits}
base:
  batch: 32
  epochs: 2
"""

PLANTED = """\
# five mistakes
study: planted
workload:
  data: digts
  model: {mlp: {width: 128, depht: 3}}
base:
  optimzer: {sgd: {}}
  epochs: "20"
  batch: 32
arms:
  sgd: {}
  adamw: {base: {rate: {peak: -1}}}
"""


def recipe(text: str = GOOD, *overrides: str, allow_code: bool = False) -> Recipe:
    return loads(text, "recipe.yaml", overrides, allow_code)


def lines(text: str, overrides: Sequence[str] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe(text, *overrides)
    assert str(caught.value).splitlines() == [str(p) for p in caught.value.problems]
    return str(caught.value).splitlines()


def test_five_planted_mistakes_are_five_lines() -> None:
    assert lines(PLANTED) == [
        'recipe.yaml:4:9: workload.data: text "digts" is not known, did you mean "digits"?',
        'recipe.yaml:5:29: workload.model.mlp.depht: unknown key, did you mean "depth"?',
        'recipe.yaml:7:3: base.optimzer: unknown key, did you mean "optimizer"?',
        'recipe.yaml:8:11: base.epochs: expected a number, got text "20": write 20 without quotes',
        "recipe.yaml:12:31: arms.adamw.base.rate.peak: expected > 0, got -1",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("study: ../../x", f'8: study: expected {NAME}, got text "../../x"'),
        ("study: 2024", "8: study: expected text, got number 2024: put it in quotes"),
        ("study: true", "8: study: expected text, got true: put it in quotes"),
        ("seeds: three", '8: seeds: expected a whole number or a list, got text "three"'),
        ("seeds: 0", "8: seeds: expected > 0, got 0"),
        ("seeds: []", "8: seeds: expected at least one entry, got none"),
        ("seeds: [1, 1]", "8: seeds: expected each value once"),
        ("seeds: [1, x]", '12: seeds[1]: expected a whole number, got text "x"'),
        ("seeds: 1.5", "8: seeds: expected a whole number or a list, got number 1.5"),
        ("precision: fp8", '12: precision: text "fp8" is not known, did you mean "fp32"?'),
        ("precision: half", '12: precision: text "half" is not known, expected one of auto, fp32, bf16, fp64'),
        ("engine: {}", "9: engine: expected exactly one of solo, ddp, deepspeed, got none"),
        ("engine: {ddp: {}, solo: {}}", "9: engine: expected exactly one of solo, ddp, deepspeed, got ddp, solo"),
        (
            "engine: {ddp: {find_unused_parameters: yes}}",
            '40: engine.ddp.find_unused_parameters: expected true or false, got text "yes": write true',
        ),
        ("engine: 3", "9: engine: expected one of solo, ddp, deepspeed, got number 3"),
        (
            "cluster: {workers: 1_0}",
            '20: cluster.workers: expected a whole number, got text "1_0": write 10 without quotes',
        ),
        ("cluster: {gangs: many}", '18: cluster.gangs: expected a whole number or auto, got text "many"'),
        ("arms: {}", "7: arms: expected at least one entry, got none"),
        ("arms: {a/b: {}}", f"8: arms.a/b: expected {NAME}"),
        ("arms: {a: {strategies: [emma]}}", '25: arms.a.strategies[0]: text "emma" is not known, did you mean "ema"?'),
        (
            "strategies: [{ema: {half_lif: 1}}]",
            '21: strategies[0].ema.half_lif: unknown key, did you mean "half_life"?',
        ),
        ("grid: {base.batchh: [1]}", '8: grid.base.batchh: unknown key, did you mean "base.batch"?'),
        ("arms: {a: {lr: 3}}", "12: arms.a.lr: unknown key, expected one of strategies, base, model, search"),
        ("grid: {base.batch: []}", "20: grid.base.batch: expected at least one entry, got none"),
        ("grid: {base.batch: [1, a]}", '24: grid.base.batch[1]: expected a whole number, got text "a"'),
        (
            "tracking: {wandb: {key: secret}}",
            "20: tracking.wandb.key: unknown key, expected one of project, mode, entity",
        ),
        (
            "workload: {data: digits, target: {test_accuracy: 1.00000001}}",
            "50: workload.target.test_accuracy: expected <= 1, got 1.00000001",
        ),
        (
            "workload: {data: digits, model: {resnet: {depth: 9}}}",
            "50: workload.model.resnet.depth: expected one of 8, 18, 20, 56, got number 9",
        ),
        ("checkpoint: null", "13: checkpoint: expected a map, got nothing (null)"),
        ("log_steps: 1e13", "12: log_steps: expected <= 1000000000000, got 10000000000000"),
    ],
)
def test_each_mistake_in_its_own_words(line: str, expected: str) -> None:
    text = "\n".join(kept for kept in GOOD.splitlines() if not kept.startswith(line.partition(":")[0] + ":"))
    row = text.count("\n") + 2
    assert lines(f"{text}\n{line}\n") == [f"recipe.yaml:{row}:{expected}"]


def test_what_is_missing_is_told_where_it_should_be() -> None:
    assert lines("study: s\nworkload: {}\nbase:\n  epochs: 1\n") == [
        "recipe.yaml:2:11: workload.data: required key is missing, "
        "expected one of digits, mnist, cifar10, spoken_digits, npz, image_folder, noisy_quadratic",
        "recipe.yaml:4:3: base.batch: required key is missing, expected a whole number",
    ]
    assert lines(GOOD.replace("digits", "npz")) == [
        "recipe.yaml:2:18: workload.data: npz needs options, write {npz: ...}"
    ]


def test_what_cannot_be_read_and_what_is_wrong_are_told_together() -> None:
    assert lines(GOOD + "base: {}\nseed: 1\nlog_steps: .inf\n") == [
        "recipe.yaml:6:1: base: duplicate key, first at line 3, column 1",
        'recipe.yaml:7:1: seed: unknown key, did you mean "seeds"?',
        "recipe.yaml:8:12: log_steps: expected a finite number",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("base.batchh=2", 'base.batchh: unknown key, did you mean "batch"?'),
        ("base.batch=a", 'base.batch: expected a whole number, got text "a"'),
        ("base.batch=", "base.batch: expected a whole number, got nothing (null)"),
        ("bas.batch=2", 'bas: unknown key, did you mean "base"?'),
        ("base.batch.size=2", "base.batch: holds a plain value, there is nothing inside to set"),
        ("grid.base.batch=2", "grid.base.batch: expected a list, got number 2"),
        ("strategies[0].ema.half_life=1", "strategies: no item 0, the list has 0"),
        ("nonsense", "expected path=value, such as base.epochs=2"),
        ("=2", "expected path=value, such as base.epochs=2"),
        ("base.batch=[1", "not YAML: expected ',' or ']', but got '<stream end>', while parsing a flow sequence"),
        ("base.batch=!!set x", "tag tag:yaml.org,2002:set refused: a recipe is plain data"),
        ("base.rate.warmup=2", "base.rate.warmup: warm-up of 2 epochs, expected less than the run's 2"),
        ("workload.model=os.system", f'workload.model: text "os.system" is not known, expected one of {MODELS}'),
    ],
)
def test_a_wrong_override_says_that_it_is_one(override: str, expected: str) -> None:
    text = GOOD + ("strategies: []\n" if "strategies" in override else "")
    assert lines(text, [override]) == [f"--set {override}: {expected}"]


def test_overrides_are_set_before_the_recipe_is_checked() -> None:
    changed = recipe(
        GOOD, "grid.base.batch=[1,2]", "base.batch=1e2", "base.optimizer.adamw.beta1=0.8", "tracking.wandb={}"
    )
    written = GOOD.replace("32", "100") + (
        "  optimizer: {adamw: {beta1: 0.8}}\ngrid: {base.batch: [1, 2]}\ntracking: {wandb: {}}\n"
    )
    assert changed == recipe(written)
    assert recipe(GOOD, "base.steps=7") == recipe(GOOD.replace("epochs: 2", "steps: 7"))
    assert recipe(GOOD, "study=a", "study=b").study == "b"


def test_an_override_reaches_into_bare_names_lists_and_arms_with_dots() -> None:
    text = GOOD + "strategies: [ema]\narms: {v1.5: {base: {optimizer: sgd}}}\n"
    changed = recipe(text, "strategies[0].ema.half_life=3", "arms.v1.5.base.optimizer.sgd.momentum=0.5")
    assert changed.strategies[0].options.half_life == 3
    assert changed.arms["v1.5"].base.optimizer.sgd.momentum == 0.5
    assert recipe(text, "arms.v1.5.base.optimizer.adamw.beta1=0.5").arms["v1.5"].base.optimizer.name == "adamw"


def test_code_is_imported_only_when_allowed() -> None:
    text = GOOD.replace("digits", "digits, model: {import: my.net:build}")
    refused = "names code to import, which can do anything: pass --allow-code if you trust the recipe"
    assert lines(text) == [f"recipe.yaml:2:42: workload.model.import: {refused}"]
    assert recipe(text, allow_code=True).workload.model.options == "my.net:build"
    assert refused in lines(GOOD + "grid: {workload.model: [mlp, {import: my.net:build}]}\n")[0]
    assert lines(text.replace("my.net:build", "os.system"))[0].endswith(
        'workload.model.import: expected package.module:function, got text "os.system"'
    )


SEMANTIC = [
    (
        "engine: solo\ncluster: {workers: 2}",
        "7:20: cluster.workers: engine solo is one worker, got 2: use engine ddp, or 1 worker",
    ),
    (
        "cluster: {workers: 2, launcher: solo}",
        "6:33: cluster.launcher: solo starts one worker, but workers is 2: use auto or gang",
    ),
    (
        "arms: {a: {base: {optimizer: {sgd: {nesterov: true, momentum: 0}}}}}",
        "6:47: arms.a.base.optimizer.sgd.nesterov: nesterov needs a momentum above 0",
    ),
    (
        "grid: {base.rate.warmup: [1, 3]}",
        "6:26: grid.base.rate.warmup: warm-up of 3 epochs, expected less than the run's 2",
    ),
    (
        "arms: {a: {base: {rate: {warmup: 2}}}}",
        "6:34: arms.a.base.rate.warmup: warm-up of 2 epochs, expected less than the run's 2",
    ),
    (
        "arms: {a: {}, b: {base: {optimizer: adamw}}}\ngrid: {base.optimizer.sgd.momentum: [0.1]}",
        "7:37: grid.base.optimizer.sgd.momentum: arm b has base.optimizer adamw, not sgd",
    ),
    ("grid: {base.epochs: [1], base.steps: [5]}", f"6:21: grid.base.epochs: {UNIT} both"),
    (
        "grid: {base.optimizer: [sgd], base.optimizer.sgd.momentum: [0.1]}",
        "6:60: grid.base.optimizer.sgd.momentum: overlaps with base.optimizer: "
        "put the values of both into one of the two",
    ),
    ("grid: {base.batch: [32, 32]}", "6:7: grid: two points train the same, base.batch=32 and base.batch=32"),
    ("arms: {a: {}, b: {base: {batch: 32}}}", "6:18: arms.b: trains the same as arm a"),
    (
        "grid: {workload.target.stop: [true]}",
        "6:30: grid.workload.target.stop: expected exactly one of test_accuracy, test_loss, train_loss, got stop",
    ),
    ("seeds: 10001", "1:1: grid: makes 10001 trials, expected at most 10000"),
]


@pytest.mark.parametrize(("text", "expected"), SEMANTIC)
def test_what_no_single_field_can_tell(text: str, expected: str) -> None:
    assert lines(f"{GOOD}{text}\n") == [f"recipe.yaml:{expected}"]


def test_a_budget_is_needed_and_only_one() -> None:
    assert lines(GOOD.replace("  epochs: 2\n", "")) == [f"recipe.yaml:4:3: base: {UNIT} neither"]
    assert lines(GOOD + "  steps: 5\n") == [f"recipe.yaml:5:11: base.epochs: {UNIT} both"]
    assert recipe(GOOD.replace("  epochs: 2\n", "arms: {a: {base: {steps: 3}}}\n"))


def test_a_file_is_named_as_it_was_given(tmp_path: Path) -> None:
    from orchestrator.recipe import load

    path = tmp_path / "r.yml"
    path.write_text(GOOD + "sed: 1\n")
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(caught.value) == f'{path}:6:1: sed: unknown key, did you mean "seeds"?'
