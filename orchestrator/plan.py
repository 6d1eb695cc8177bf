"""What a run would do, told before it is done: batch arithmetic, phases, needs against offers, what is on file already."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from cluster.engines import OFFERS
from orchestrator.compose import compose
from orchestrator.identity import canonical
from orchestrator.recipe import Recipe, expand
from orchestrator.study import Study
from orchestrator.trial import Trial
from orchestrator.workloads.noisy_quadratic import QuadraticData
from strategies.contract import Need, Plan, PlanError


def check_plans(recipe: Recipe) -> int:
    """Composes every arm at every grid point, without data and without torch; the number of trials. Raises PlanError."""
    trials = expand(recipe, lambda data: "", "fp32")
    for _, group in _settings(trials):
        _compose(next(iter(group)), examples=1)
    return len(trials)


def _compose(trial: Trial, examples: int) -> Plan:
    try:
        return compose(trial, examples)
    except PlanError as error:
        raise PlanError(f"arms.{trial.arm}: {error}") from None


def _settings(trials: list[Trial]) -> Iterable[tuple[Any, Iterable[Trial]]]:
    """Trials that differ by their seed alone stand together in the order of a recipe."""
    return groupby(trials, key=lambda trial: (trial.arm, sorted(trial.point.items())))


def as_data(study: Study) -> dict[str, Any]:
    """JSON data; `bigbatch plan --json` prints it. Raises DataError if the data set is not there."""
    from orchestrator.workloads import load

    recipe, data = study.recipe, study.recipe.workload.data
    examples = QuadraticData.examples if data.noisy_quadratic else len(load(data).train_y)
    settings = [_setting(study, list(group), examples) for _, group in _settings(study.trials)]
    offers = OFFERS[recipe.engine.name]
    return {
        "study": recipe.study,
        "directory": str(study.store.directory),
        "data": {"name": data.name, "examples": examples, "fingerprint": study.trials[0].data},
        "engine": recipe.engine.name,
        "offers": _names(offers),
        "workers": recipe.cluster.workers,
        "precision": study.trials[0].precision,
        "trials": len(study.trials),
        "done": sum(s["done"] for s in settings),
        "settings": settings,
    }


def _setting(study: Study, trials: list[Trial], examples: int) -> dict[str, Any]:
    trial = trials[0]
    plan = _compose(trial, examples)
    workers = trial.cluster.workers
    micro = trial.local_batch
    share = -(-trial.base.batch // workers)
    return {
        "arm": trial.arm,
        "point": trial.point,
        "batch": trial.base.batch,
        "workers": workers,
        "micro_batch": micro,
        "accumulation": -(-share // micro),
        "found": trial.base.micro_batch == "auto",
        "steps": sum(p.steps(examples) for p in plan.phases),
        "phases": [{"name": p.name, "epochs": p.epochs, "learner": canonical(p.learner)} for p in plan.phases],
        "needs": _names(plan.needs),
        "seeds": [t.seed for t in trials],
        "trials": [t.id for t in trials],
        "done": sum(study.store.finished(t.id) for t in trials),
    }


def _names(needs: Need) -> list[str]:
    return sorted(n.name for n in needs if n.name)


def as_text(data: dict[str, Any]) -> str:
    """The plan for people: one line per setting."""
    source = data["data"]
    left = data["trials"] - data["done"]
    lines = [
        f"study {data['study']}: {data['trials']} trials, {data['done']} done, {left} to run, in {data['directory']}",
        f"data {source['name']}: {source['examples']} training examples, fingerprint {source['fingerprint']}",
        f"engine {data['engine']} on {data['workers']} workers in {data['precision']}; it offers {', '.join(data['offers'])}",
        "",
        f"{'arm':16}{'batch':>8} = {'workers x micro x accumulation':32}{'steps':>9}  {'seeds':>5}{'done':>6}  phases; needs",
    ]
    return "\n".join(lines + [_line(s) for s in data["settings"]])


def _line(s: dict[str, Any]) -> str:
    arithmetic = f"{s['workers']} x {s['micro_batch']} x {s['accumulation']}" + (
        " (memory permitting)" if s["found"] else ""
    )
    phases = " > ".join(f"{p['name']} {p['epochs']:g} epochs" for p in s["phases"])
    others = ", ".join(f"{k}={v}" for k, v in s["point"].items() if k != "base.batch")
    tail = f"{phases}; {', '.join(s['needs']) or 'nothing'}" + (f"  [{others}]" if others else "")
    return f"{s['arm']:16}{s['batch']:>8} = {arithmetic:32}{s['steps']:>9}  {len(s['seeds']):>5}{s['done']:>6}  {tail}"
