"""The JSON Schema and the loader give the same verdict, on the shipped recipes and on every way to get one wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from orchestrator.recipe import Recipe, RecipeError, json_schema, load
from orchestrator.recipe.checks import check
from orchestrator.recipe.load import loads, validate_structure
from orchestrator.recipe.messages import findings
from orchestrator.recipe.problems import Path
from orchestrator.recipe.yaml_nodes import read

RECIPES = FilePath(__file__).parents[2] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml"))
SHARE = 8  # one in so many mutations; of 21 or 19 for each place, so that all kinds come up
VALUES: list[Any] = [None, True, 0, -1, 7, 3.0, 0.5, 1.5, 1e13, "0.1", "x", "", {}, [], {"x": 1}, ["x"], [1], [[]]]
FULL = """\
study: everything
workload:
  data: {npz: {path: a.npz}}
  model: {resnet: {depth: 20, width: null}}
  augment: {crop: 4, flip: true}
  target: {train_loss: 0.1, stop: true}
  evaluate: {steps: 10}
engine: {ddp: {find_unused_parameters: true}}
cluster: {workers: 2, threads: 1, launcher: gang, gangs: 2, max_failures: 1, timeout: 60}
precision: fp32
base:
  optimizer: {adamw: {beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0}}
  steps: 100
  batch: 32
  micro_batch: 16
  rate: {peak: 0.1, per: 32, scale: linear, warmup: 0, start: 0.1, decay: {step: {at: [0.5], factor: 0.1}}}
strategies: [ema, {label_smoothing: {amount: 0.2}}]
arms:
  a: {strategies: [{gradient_clipping: {norm: 1}}], base: {optimizer: {sgd: {momentum: 0.5}}, epochs: 3}}
  b: {base: {rate: {decay: {polynomial: {power: 1, end: 0}}}}}
grid: {base.rate: [{peak: 1}], base.optimizer: [sgd, {adamw: {beta1: 0.5}}], precision: [fp32], base.micro_batch: [auto]}
seeds: [3, 5]
tracking: {wandb: {project: p, mode: online, entity: me}}
checkpoint: {seconds: 0, keep: 1}
log_steps: 10
"""
TEXTS = [path.read_text() for path in SHIPPED] + [FULL]


def paths(data: Any, path: Path = ()) -> Iterator[Path]:
    """Every place in the data, below the top."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def at(data: Any, path: Path) -> Any:
    for key in path:
        data = data[key]
    return data


def with_value(data: Any, path: Path, value: Any) -> Any:
    changed = copy.deepcopy(data)
    at(changed, path[:-1])[path[-1]] = copy.deepcopy(value)
    return changed


def without(data: Any, path: Path) -> Any:
    changed = copy.deepcopy(data)
    del at(changed, path[:-1])[path[-1]]
    return changed


def with_key(data: Any, path: Path, name: str, keep: bool) -> Any:
    """The entry at `path` under another name too, or instead; in the same order."""
    changed = copy.deepcopy(data)
    parent = at(changed, path[:-1])
    entries = list(parent.items())
    parent.clear()
    for key, value in entries:
        parent.update({key: value} if key != path[-1] or keep else {})
        parent.update({name: value} if key == path[-1] else {})
    return changed


def slip(key: str) -> str:
    """A key with one letter left out, or doubled where it is short."""
    return key[:-2] + key[-1] if len(key) > 3 else key + key[-1]


def mutations(data: Any) -> Iterator[Any]:
    for path in paths(data):
        yield without(data, path)
        for value in VALUES:
            yield with_value(data, path, value)
        if isinstance(path[-1], str):
            for keep in (False, True):
                yield with_key(data, path, slip(path[-1]), keep)


def data_of(text: str) -> Any:
    document = read(text, "recipe.yaml")
    assert not document.problems
    return document.data


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_right_and_say_what_they_test(path: FilePath, validator: Draft202012Validator) -> None:
    lines = path.read_text().splitlines()
    assert load(path).study == path.stem
    assert validator.is_valid(data_of(path.read_text()))
    assert lines[0] == "# yaml-language-server: $schema=./recipe.schema.json"
    assert lines[1].startswith("# Claim under test: ") and len(lines) <= 40


@pytest.mark.parametrize("each", [SHARE, pytest.param(1, marks=pytest.mark.slow)])
def test_loader_and_schema_agree_on_mutations(validator: Draft202012Validator, each: int) -> None:
    corpus = [mutant for text in TEXTS for mutant in mutations(data_of(text))][::each]
    verdicts = [(not validate_structure(mutant), validator.is_valid(mutant)) for mutant in corpus]
    disagreed = [mutant for mutant, (ours, theirs) in zip(corpus, verdicts, strict=True) if ours != theirs]
    assert disagreed == []
    assert len(corpus) >= 500
    right = sum(ours for ours, _ in verdicts)
    assert len(corpus) * 0.05 < right < len(corpus) * 0.5  # a corpus that only one verdict fits would prove nothing


def test_no_mutation_is_a_traceback_and_every_wrong_one_is_explained() -> None:
    for text in TEXTS:
        for mutant in list(mutations(data_of(text)))[::SHARE]:
            errors = validate_structure(mutant)
            found = findings(errors, mutant, Recipe) if errors else check(Recipe.model_validate(mutant))
            assert bool(found) or not errors


def is_free(path: Path) -> bool:
    """Names of arms are the author's own, so no slip in them can be told."""
    return len(path) == 2 and path[0] == "arms"


def keys_to_slip() -> Iterator[tuple[Any, Path]]:
    for text in TEXTS:
        data = data_of(text)
        yield from ((data, path) for path in paths(data) if isinstance(path[-1], str) and not is_free(path))


def test_every_slip_in_a_key_is_told_with_the_right_name() -> None:
    count = 0
    for data, path in keys_to_slip():
        key = str(path[-1])
        with pytest.raises(RecipeError) as caught:
            loads(json.dumps(with_key(data, path, slip(key), keep=False)), "recipe.json")
        told = [p for p in caught.value.problems if "unknown key" in p.message]
        assert [p.message for p in told] == [f'unknown key, did you mean "{key}"?']
        assert told[0].path.endswith(slip(key)) and told[0].line
        count += 1
    assert count > 100


def test_the_committed_schema_is_the_one_that_the_code_prints() -> None:
    committed = (RECIPES / "recipe.schema.json").read_text()
    assert committed == json.dumps(json_schema(), indent=1) + "\n", "run: bigbatch schema > recipes/recipe.schema.json"


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects(value)


def test_no_object_of_the_schema_lets_an_unknown_key_pass() -> None:
    found = list(objects(json_schema()))
    assert len(found) > 30 and all(schema["additionalProperties"] is False for schema in found)


def test_the_schema_explains_itself() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema" and schema["title"]
    batch = schema["$defs"]["Base"]["properties"]["batch"]
    assert batch["description"] == "global batch: examples per optimizer step" and batch["exclusiveMinimum"] == 0
    assert schema["properties"]["engine"]["default"] == {"ddp": {}} and schema["properties"]["grid"]["default"] == {}


def test_the_full_recipe_is_right() -> None:
    assert Recipe.model_validate(data_of(FULL)).seeds == [3, 5]
