"""From the words of `bigbatch predict` to forecasts, one for each arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.files import Damaged
from orchestrator.predict.calibrate import calibrate
from orchestrator.predict.forecast import Forecast, forecast
from orchestrator.predict.hardware import DEFAULT, OWN, PRESETS, Hardware, load
from orchestrator.predict.measured import chosen, measured, summaries
from orchestrator.predict.steps import steps_of
from orchestrator.recipe.choices import LARGEST


def predict(
    studies: Sequence[Path],
    workers: str,
    arm: str | None = None,
    batches: str | None = None,
    hardware: str | None = None,
    force: bool = False,
) -> tuple[list[Forecast], list[str]]:
    """Forecasts by arm, and why other arms have none. Steps are those of the first study, step times those of all.

    Raises Damaged or RecipeError if there is no forecast at all.
    """
    counts = numbers("--workers", workers)
    sizes = numbers("--batch", batches) if batches else None
    network = _hardware(hardware or DEFAULT)
    found = summaries(studies)
    forecasts, refusals = [], []
    for name in chosen(found, arm):
        try:
            steps = steps_of(found[0].points(name), f"{studies[0]}: arm {name}")
            forecasts.append(forecast(steps, calibrate(measured(found, name)), network, counts, sizes, force))
        except Damaged as refusal:
            refusals.append(str(refusal))
    if not forecasts:
        raise Damaged("\n".join(refusals))
    return forecasts, refusals


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers from 1, separated by commas."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= LARGEST for word in words):
        raise Damaged(f"{option}: expected whole numbers from 1, separated by commas, such as 8,64; got {text!r}")
    return [int(word) for word in words]


def _hardware(name: str) -> Hardware | None:
    """None for the network that the studies ran on."""
    if name == OWN:
        return None
    return PRESETS.get(name) or load(Path(name))
