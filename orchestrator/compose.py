"""From a trial to its plan: the usual learner from `base`, then each strategy's edit. Imports no torch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from cluster.engines import OFFERS, variant
from orchestrator.recipe import scaling, schema, workload_schema
from orchestrator.trial import Trial
from orchestrator.workloads import build_network
from orchestrator.workloads.noisy_quadratic import NoisyQuadratic, network
from strategies import CATALOGUE, optimizers, rate
from strategies.backprop import Backprop
from strategies.contract import Learner, ModelSpec, Need, Phase, Plan, PlanError, all_data


def compose(trial: Trial, examples: int) -> Plan:
    """The plan of a trial on a data set of `examples`. Raises PlanError if methods clash or the engine cannot serve them."""
    plan = Plan((_base_phase(trial, examples),))
    for name, options in trial.strategies:
        if CATALOGUE[name].scales_rate:
            _check_unscaled(name, trial.base)
        plan = CATALOGUE[name](**options).edit(plan)
    _check_cached(plan, trial.workload.augment)
    check(plan, variant(trial.engine.name, trial.engine.options.model_dump()))
    if trial.cluster.workers % plan.roles:
        raise PlanError(
            f"the plan has {plan.roles} roles, each on workers of its own, cluster.workers is {trial.cluster.workers}: "
            f"take a multiple of {plan.roles}"
        )
    return plan


def _check_cached(plan: Plan, augment: workload_schema.Augment) -> None:
    """Raises PlanError where features that are kept for each example once would have to differ from epoch to epoch."""
    for phase in (phase for phase in plan.phases if phase.cache):
        changes = {
            "workload.augment": augment.crop or augment.flip,
            "a strategy that changes batches": phase.maps,
            "a strategy that changes the data": phase.source is not all_data,
            "a strategy that looks at images in several ways": phase.views,
        }
        for what in (name for name, there in changes.items() if there):
            raise PlanError(
                f"the cache keeps the features of each image as it is, but {what} shows other images: "
                "write `cache: off`, or leave that out"
            )


def _check_unscaled(method: str, base: schema.Base) -> None:
    """Raises PlanError if the recipe states rate or budget at its own batch size, where the method states them at another."""
    if base.rate.scale != "none":
        raise PlanError(f"{method} scales the rate itself, but base.rate.scale is {base.rate.scale}: leave it out")
    if base.steps is not None:
        raise PlanError(f"{method} makes as many steps as its gain asks for: state base.epochs instead of base.steps")


def check(plan: Plan, engine: str) -> None:
    """Raises PlanError if the plan asks for what the engine does not offer."""
    missing = plan.needs & ~OFFERS[engine]
    if missing:
        able = [name for name, offers in OFFERS.items() if plan.needs in offers]
        advice = f"use engine {' or '.join(able)}" if able else "no engine offers all of it yet"
        raise PlanError(f"the plan needs {_names(plan.needs)}; engine {engine} lacks {_names(missing)}: {advice}")


def _names(needs: Need) -> str:
    return ", ".join(sorted(n.name for n in needs if n.name)) or "nothing"


def _base_phase(trial: Trial, examples: int) -> Phase:
    base, workers = trial.base, trial.cluster.workers
    if workers == 1 and trial.compression:
        raise PlanError("engine: ddp: compression needs 2 workers or more, cluster.workers is 1: leave it out")
    if trial.engine.deepspeed and trial.precision == "fp64":
        raise PlanError(
            "engine deepspeed keeps weights in float32, precision is fp64: write fp32 or bf16, or engine ddp"
        )
    if base.batch < workers:
        raise PlanError(
            f"base.batch is {base.batch}, but each of {workers} workers needs an example: take fewer workers"
        )
    epochs = base.epochs if base.epochs is not None else (base.steps or 0) * base.batch / examples
    quadratic = trial.workload.data.noisy_quadratic
    model = ModelSpec(network) if quadratic else _model(trial.workload.model)
    learner = _quadratic(base, quadratic) if quadratic else _backprop(base)
    return Phase(name="train", epochs=epochs, batch=base.batch, model=model, learner=learner)


def _model(choice: workload_schema.Network) -> ModelSpec:
    if choice.name == "import":
        _check_importable(choice.options)
    options = {"path": choice.options} if choice.name == "import" else choice.options.model_dump()
    return ModelSpec(build_network, (("name", choice.name), *sorted(options.items())))


def _check_importable(path: str) -> None:
    """Raises PlanError if the user's module is not there. It is not imported: that is for the workers."""
    module = path.partition(":")[0]
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        found = None
    if not found:
        raise PlanError(
            f"model: import: no module named {module!r}: it has to lie in the current folder, or be installed"
        )


def _backprop(base: schema.Base) -> Learner:
    factories = {"sgd": optimizers.Sgd, "adamw": optimizers.AdamW}
    optimizer = factories[base.optimizer.name](**scaling.optimizer_options(base))
    return Backprop(optimizer=optimizer, rate=_rate(base))


def _quadratic(base: schema.Base, data: workload_schema.QuadraticData) -> Learner:
    if base.optimizer.sgd is None or base.optimizer.sgd.momentum or base.optimizer.sgd.weight_decay:
        raise PlanError("noisy_quadratic follows plain SGD in closed form: write `optimizer: {sgd: {momentum: 0}}`")
    return NoisyQuadratic(dimension=data.dimension, rate=_rate(base))


def _rate(base: schema.Base) -> rate.Rate:
    spec = base.rate
    return rate.Rate(scaling.peak(base), spec.warmup, spec.start, DECAYS[spec.decay.name](spec.decay.options))


DECAYS: dict[str, Any] = {
    "none": lambda options: rate.Constant(),
    "cosine": lambda options: rate.Cosine(),
    "linear": lambda options: rate.Polynomial(),
    "polynomial": lambda options: rate.Polynomial(options.power, options.end),
    "step": lambda options: rate.Steps(tuple(options.at), options.factor),
}
