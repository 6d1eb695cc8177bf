"""The rule of equal tuning: LARS and LAMB stand beside Nesterov momentum and AdamW that are tuned as much.

Tuned so, plain methods matched them where they had seemed behind (Nado et al. 2021, arXiv 2102.06356). A baseline counts at
the same batch size, with the same kind of decay and the same further strategies. A pure function of the recipe.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.recipe import resolve
from orchestrator.recipe.messages import Finding
from orchestrator.recipe.problems import Path
from orchestrator.recipe.schema import Base
from orchestrator.recipe.study_schema import Recipe

CODE = "W-UNFAIR"
LAYERWISE = ("lars", "lamb")
BASELINES = ("nesterov", "adamw")
WAY_OUT = 'tune them alike, or give the reason as `unfair: "..."`'


@dataclass(frozen=True, slots=True)
class Contender:
    """What an arm does at one batch size."""

    arm: str
    method: str  # lars, lamb, nesterov, adamw, sgd
    batch: int
    rules: str  # that a fair comparison shares: kind of decay, further strategies with their options


def budgets(recipe: Recipe) -> Counter[Contender]:
    """The settings that each contender is tried at, seeds aside."""
    counted: Counter[Contender] = Counter()
    for point in resolve.points(recipe):
        base = Base.model_validate(point.data["base"])
        listed = resolve.methods(recipe, recipe.arms[point.arm])
        others = [method for method in listed if method[0] not in LAYERWISE]
        rules = json.dumps([base.rate.decay.name, others], sort_keys=True)
        search = resolve.search_of(recipe, point.arm)
        contender = Contender(point.arm, _method([name for name, _ in listed], base), base.batch, rules)
        counted[contender] += search.points if search else 1
    return counted


def _method(strategies: list[str], base: Base) -> str:
    sgd = base.optimizer.sgd
    plain = "nesterov" if sgd and sgd.nesterov else base.optimizer.name
    return next((name for name in LAYERWISE if name in strategies), plain)


def has_layerwise(recipe: Recipe) -> bool:
    """Whether the rule has anything to say of a recipe."""
    return any(contender.method in LAYERWISE for contender in budgets(recipe))


def unfair(recipe: Recipe) -> list[Finding]:
    """Where a recipe breaks the rule, each arm once; nothing where it states a reason."""
    counted = budgets(recipe)
    found: dict[Path, Finding] = {}
    for one in counted:
        for finding in _against(one, counted, recipe) if one.method in LAYERWISE and not recipe.unfair else ():
            found.setdefault(finding.path, finding)
    return list(found.values())


def _against(one: Contender, counted: Counter[Contender], recipe: Recipe) -> Iterator[Finding]:
    path = ("arms", one.arm) if "arms" in recipe.model_fields_set else ("strategies",)
    alike = [c for c in counted if (c.batch, c.rules) == (one.batch, one.rules)]
    lacking = [name for name in BASELINES if not any(c.method == name for c in alike)]
    if lacking:
        beside = f"no {' and no '.join(lacking)} arm beside it at batch {one.batch} with its decay and strategies"
        yield Finding(path, f"{CODE}: {one.method} has {beside}: add them, {WAY_OUT}")
    for other in alike:
        if other.method in BASELINES and counted[other] != counted[one]:
            tried = f"{one.method} is tried at {counted[one]} settings, arm {other.arm} at {counted[other]}"
            yield Finding(path, f"{CODE}: {tried}: {WAY_OUT}")
