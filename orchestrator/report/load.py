"""A study directory as data: results that have passed a check, the recipe, the environment. Texts come out printable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError

from orchestrator.fairness import has_layerwise, unfair
from orchestrator.files import Damaged, printable, read_json, read_lines
from orchestrator.recipe import Recipe
from orchestrator.recipe.resolve import search_of, size
from orchestrator.store import Store


def as_text(value: Any) -> str:
    """Any JSON value as one printable line."""
    return printable(value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False))


Text = Annotated[str, AfterValidator(printable)]
AnyText = Annotated[str, BeforeValidator(as_text)]
Metrics = dict[Text, float | None]


class Target(BaseModel):
    metric: Text
    value: float
    reached: bool = False
    step: int | None = None
    examples: int | None = None
    epochs: float | None = None
    flops: float | None = None
    seconds: float | None = None


class Result(BaseModel):
    """A result.json. What a report can do without has a default, for trials that failed early."""

    trial: Text
    arm: Text
    batch: int
    seed: int
    status: Text
    role: Text = "grid"  # tuning: a point of a search; winner: the best of them, on a seed of its own
    edge: Text | None = None  # of a winner: where its point lies at the edge of the box
    point: dict[Text, Any] = {}
    steps: int | None = None
    epochs: float | None = None
    examples: int | None = None
    flops: float | None = None  # of training
    final: Metrics = {}
    best: Metrics = {}
    target: Target | None = None
    seconds: Metrics = {}
    examples_per_second: float | None = None
    workers: int | None = None
    roles: int = 1  # parts of the network, each on workers of its own
    threads: int | None = None
    micro_batch: int | None = None
    precision: Text | None = None
    device: Text | None = None
    parameters: int | None = None
    reused: Annotated[bool, BeforeValidator(bool)] = False
    error: AnyText | None = None

    @property
    def failed(self) -> bool:
        """It broke down: no answer of any kind, unlike a trial that diverged or missed its target."""
        return self.status == "failed"

    @property
    def diverged(self) -> bool:
        return self.status == "diverged"

    @property
    def tuning(self) -> bool:
        return self.role == "tuning"


@dataclass(frozen=True)
class Study:
    path: Path
    name: str
    results: list[Result]  # by arm, in the order of the recipe, then batch, point and seed
    planned: int  # trials, with those that have no result and winners that no search has called for yet
    env: dict[str, Any]
    recipe: str
    stated: tuple[str, ...] = ()  # arms of the recipe, with or without results
    layerwise: bool = False  # whether LARS or LAMB are among the arms
    cautions: tuple[str, ...] = ()  # of the recipe, or the reason that it gives instead
    adaptive: tuple[str, ...] = ()  # arms whose search chooses each point by those before it

    @property
    def arms(self) -> list[str]:
        """Those with results, in the order of the recipe."""
        return list(dict.fromkeys(r.arm for r in self.results))

    def config(self, result: Result) -> dict[str, Any]:
        return _optional_json(self.path / "trials" / result.trial / "config.json")

    def curve(self, result: Result, metric: str) -> tuple[list[float], list[float]]:
        """Epochs and values of the rows that hold the metric."""
        rows = self.rows(result)
        points = [(r["epoch"], r[metric]) for r in rows if r.get(metric) is not None and r.get("epoch") is not None]
        return [x for x, _ in points], [y for _, y in points]

    def evaluated(self, result: Result) -> list[int]:
        """Steps at which the metric of the target was measured."""
        metric = result.target.metric if result.target else ""
        return [r["step"] for r in self.rows(result) if r.get(metric) is not None and r.get("step") is not None]

    def rows(self, result: Result) -> list[dict[str, Any]]:
        """Of metrics.jsonl; none if there is no such file."""
        try:
            return read_lines(self.path / "trials" / result.trial / "metrics.jsonl")
        except FileNotFoundError:
            return []


def load(path: Path, trials: Sequence[str] | None) -> Study:
    """`trials` None: those of the recipe as it was last run.

    Raises FileNotFoundError if `path` is no study, Damaged if a file does not hold what it should.
    """
    folder = path / "trials"
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: not a study directory (it has no trials/)")
    named = Store(path).trial_ids() if trials is None else trials
    ids = list(dict.fromkeys(named))
    results = [_result(folder / name / "result.json") for name in ids if (folder / name / "result.json").is_file()]
    resolved = _optional_yaml(path / "resolved.yaml")
    recipe = _recipe(resolved)
    uncalled = max(0, size(recipe) - len(named)) if recipe else 0
    arms = [printable(str(name)) for name in resolved.get("arms") or ()]
    return Study(
        path=path,
        results=sorted(results, key=lambda r: (_place(r.arm, arms), r.batch, as_text(r.point), r.seed, r.trial)),
        planned=len(ids) + uncalled,
        name=printable(str(resolved.get("study") or path.resolve().name)),
        env=_optional_json(path / "env.json"),
        recipe=_optional_text(path / "recipe.yaml"),
        **(_of_recipe(recipe) if recipe else {}),
    )


def _recipe(resolved: dict[str, Any]) -> Recipe | None:
    """None if it is in another version's words."""
    try:
        return Recipe.model_validate(resolved)
    except ValidationError:
        return None


def _of_recipe(recipe: Recipe) -> dict[str, Any]:
    """Its arms, what the rule of equal tuning says, and how points are found."""
    told = [printable(finding.message) for finding in unfair(recipe)]
    reason = [f"Tuned unequally by intent: {printable(recipe.unfair)}"] if recipe.unfair else []
    searches = {printable(arm): search_of(recipe, arm) for arm in recipe.arms}
    adaptive = tuple(arm for arm, search in searches.items() if search and search.method.name == "optuna")
    return {
        "stated": tuple(searches),
        "layerwise": has_layerwise(recipe),
        "cautions": tuple(told + reason),
        "adaptive": adaptive,
    }


def _place(arm: str, arms: list[str]) -> tuple[int, str]:
    """In the order of the recipe; arms that it does not know come last, by name."""
    return (arms.index(arm) if arm in arms else len(arms)), arm


def _result(path: Path) -> Result:
    try:
        result = Result.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise Damaged(f"{path}: {printable(place)}: {first['msg']}") from None
    return result.model_copy(update={"trial": path.parent.name})  # the directory is the identity


def _optional_text(path: Path) -> str:
    """Printable line by line; empty if the file is not there."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(printable(line) for line in text.splitlines())


def _optional_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(_optional_text(path))
    except yaml.YAMLError as error:
        raise Damaged(f"{path}: not YAML: {printable(str(error))}") from None
    return value if isinstance(value, dict) else {}


def _optional_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}
