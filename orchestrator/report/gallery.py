"""The figures of a report, in their order: for each name what draws it, and what writes its title and caption."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from orchestrator.report import (
    arm_profiles,
    best_rates,
    captions,
    figures,
    figures_comparison,
    figures_features,
    figures_prediction,
    figures_rates,
    noise_scales,
    outlook,
    stage_features,
    tuning_budgets,
)
from orchestrator.report.summary import Summary


class Entry(NamedTuple):
    make: figures.Maker
    caption: Callable[[Summary], tuple[str, str]]  # title, caption; asked for only where the figure was drawn


GALLERY = {
    "steps_to_target": Entry(figures.steps, captions.steps),
    "final_metric": Entry(figures.final, captions.final),
    "time_to_target": Entry(figures.seconds, captions.seconds),
    "training_curves": Entry(figures.curves, captions.curves),
    "best_rate": Entry(figures_rates.rates, best_rates.caption),
    "performance_profile": Entry(figures_comparison.performance_profile, arm_profiles.profiles_caption),
    "tuning_budget": Entry(figures_comparison.tuning_budget, tuning_budgets.budgets_caption),
    "noise_scale": Entry(figures_comparison.noise_scale, noise_scales.noise_caption),
    "features": Entry(figures_features.features, stage_features.features_caption),
    "prediction": Entry(figures_prediction.fan, outlook.fan_caption),
    "time_and_cost": Entry(figures_prediction.time_and_cost, outlook.cost_caption),
}


def draw(summary: Summary) -> dict[str, dict[str, bytes]]:
    """Figure name -> {"svg": ..., "pdf": ...}, for those that the data allow."""
    return figures.draw(summary, {name: entry.make for name, entry in GALLERY.items()})
