"""What a run would do, told before it is done: batch arithmetic, phases, needs against offers, what is on file already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from cluster.engines import OFFERS, variant
from orchestrator.compose import compose
from orchestrator.identity import canonical
from orchestrator.recipe import Recipe
from orchestrator.recipe.messages import Finding
from orchestrator.recipe.problems import spell
from orchestrator.recipe.resolve import axes, search_of, size
from orchestrator.search.stages import Stages
from orchestrator.study import Study
from orchestrator.trial import Trial
from orchestrator.workloads.noisy_quadratic import QuadraticData
from strategies.contract import Need, Plan, PlanError


def check_plans(recipe: Recipe) -> int:
    """The number of trials. Raises PlanError with what is wrong with all arms, a line each."""
    if found := impossible(recipe):
        raise PlanError("\n".join(f"{spell(finding.path)}: {finding.message}" for finding in found))
    return size(recipe)


def impossible(recipe: Recipe) -> list[Finding]:
    """Composes every arm at every grid point, without data and without torch: what cannot be, each once."""
    trials = Stages(recipe, lambda data: "", "fp32", read=lambda trial: None).trials
    settings = (next(group) for _, group in groupby(trials, key=lambda trial: (trial.arm, sorted(trial.point.items()))))
    return list(dict.fromkeys(finding for trial in settings for finding in _impossible(trial)))


def _impossible(trial: Trial) -> Iterator[Finding]:
    try:
        compose(trial, examples=1)
    except PlanError as error:
        yield Finding(("arms", trial.arm), str(error))


def _compose(trial: Trial, examples: int) -> Plan:
    try:
        return compose(trial, examples)
    except PlanError as error:
        raise PlanError(f"arms.{trial.arm}: {error}") from None


def _settings(recipe: Recipe, trials: list[Trial]) -> Iterable[tuple[Any, Iterable[Trial]]]:
    """Trials that differ by their seed, or by their point in a search, stand together in the order of a recipe."""
    grid = axes(recipe)
    return groupby(trials, key=lambda trial: (trial.arm, [trial.point[path] for path in grid], trial.role))


def as_data(study: Study) -> dict[str, Any]:
    """JSON data; `bigbatch plan --json` prints it. Raises DataError if the data set is not there."""
    from orchestrator.workloads import load

    recipe, data = study.recipe, study.recipe.workload.data
    examples = QuadraticData.examples if data.noisy_quadratic else len(load(data).train_y)
    settings = [_setting(study, list(group), examples) for _, group in _settings(recipe, study.trials)]
    engine = variant(recipe.engine.name, recipe.engine.options.model_dump())
    return {
        "study": recipe.study,
        "directory": str(study.store.directory),
        "data": {"name": data.name, "examples": examples, "fingerprint": study.trials[0].data},
        "engine": engine,
        "offers": _names(OFFERS[engine]),
        "workers": recipe.cluster.workers,
        "precision": study.trials[0].precision,
        "trials": size(recipe),
        "done": sum(s["done"] for s in settings),
        "settings": settings,
    }


def _setting(study: Study, trials: list[Trial], examples: int) -> dict[str, Any]:
    trial = trials[0]
    plan = _compose(trial, examples)
    workers = trial.cluster.workers
    replicas = workers // plan.roles
    micro = trial.micro_batch(replicas)
    return {
        "arm": trial.arm,
        "point": trial.point if trial.role == "winner" else {path: trial.point[path] for path in axes(study.recipe)},
        "batch": trial.base.batch,
        "workers": workers,
        "roles": plan.roles,
        "replicas": replicas,
        "micro_batch": micro,
        "accumulation": -(-trial.base.batch // (replicas * micro)),
        "found": trial.base.micro_batch == "auto",
        "steps": sum(p.steps(examples) for p in plan.phases),
        "phases": [{"name": p.name, "epochs": p.epochs, "learner": canonical(p.learner)} for p in plan.phases],
        "needs": _names(plan.needs),
        "seeds": sorted({t.seed for t in trials}),
        "search": _search(study, trial),
        "trials": [t.id for t in trials],
        "done": sum(map(study.done, trials)),
    }


def _search(study: Study, trial: Trial) -> dict[str, Any] | None:
    """The budget of the cell that the trial belongs to; None outside a search."""
    search = search_of(study.recipe, trial.arm)
    if search is None:
        return None
    budget = {"method": search.method.name, "points": search.points, "winners": search.winners}
    return budget | {"prune": search.prune.name, "role": trial.role}


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
        f"{'arm':16}{'batch':>8} = {'replicas x micro x accumulation':32}{'steps':>9}  {'seeds':>5}{'done':>6}  phases; needs",
    ]
    return "\n".join(lines + [_line(s) for s in data["settings"]])


def _line(s: dict[str, Any]) -> str:
    arithmetic = f"{s['replicas']} x {s['micro_batch']} x {s['accumulation']}" + " (memory permitting)" * s["found"]
    phases = " > ".join(f"{p['name']} {p['epochs']:g} epochs" for p in s["phases"])
    others = ", ".join(f"{k}={v}" for k, v in s["point"].items() if k != "base.batch")
    needs = (", ".join(s["needs"]) or "nothing") + (f" on {s['roles']} roles" if s["roles"] > 1 else "")
    tail = f"{phases}; {needs}" + (f"  [{others}]" if others else "") + _budget(s)
    return f"{s['arm']:16}{s['batch']:>8} = {arithmetic:32}{s['steps']:>9}  {len(s['seeds']):>5}{s['done']:>6}  {tail}"


def _budget(s: dict[str, Any]) -> str:
    """What a search may cost, on the line of its points."""
    search = s["search"]
    if not search or search["role"] == "winner":
        return "  winner on fresh seeds" if search else ""
    tuning, again = search["points"] * len(s["seeds"]), search["winners"]
    what = f"{search['method']} {search['points']} points, then the best on {again} fresh seeds"
    return f"  {what}: at most {(tuning + again) * s['steps']} steps, pruning {search['prune']}"
