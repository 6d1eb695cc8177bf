"""What a recipe's scaling rule makes of the base learner at its batch size."""

from __future__ import annotations

from typing import Any

from orchestrator.recipe.schema import Base
from strategies import rate
from strategies.contract import PlanError


def peak(base: Base) -> float:
    """The peak rate at `base.batch`. Raises PlanError if the rule and its options do not go together."""
    spec = base.rate
    return rate.scaled(spec.peak, base.batch, spec.per, spec.scale, spec.noise_scale)


def optimizer_options(base: Base) -> dict[str, Any]:
    """The optimizer's options at `base.batch`. Raises PlanError if the rule is not for it, or leaves its range."""
    options, adam = base.optimizer.options.model_dump(), base.optimizer.adamw
    if base.rate.scale != "adam_sde":
        return options
    if adam is None:
        raise PlanError(f"adam_sde scales adamw, but the optimizer is {base.optimizer.name}: use linear or sqrt")
    scaled = rate.adam_sde(adam.beta1, adam.beta2, adam.eps, base.batch, base.rate.per)
    return options | dict(zip(("beta1", "beta2", "eps"), scaled, strict=True))
