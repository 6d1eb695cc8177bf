"""The next point by an Optuna sampler, as a pure function of the points before it: no study of Optuna's is kept."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import TypeAlias

from orchestrator.search.designs import Unit

Rank: TypeAlias = "tuple[float, float]"


def installed() -> bool:
    return importlib.util.find_spec("optuna") is not None


@functools.cache
def propose(sampler: str, seed: int, dimensions: int, history: tuple[tuple[Unit, Rank], ...]) -> Unit:
    """Where to look next, given (point, rank) of all points so far; a lower rank is better.

    The sampler is told places in the ranking, which say what a miss is worth where steps to target cannot. It is made
    anew for each point, with a seed of its own: what it says depends on nothing but the arguments.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    side: optuna.distributions.BaseDistribution = optuna.distributions.FloatDistribution(0, 1)
    axes = {str(i): side for i in range(dimensions)}
    number = (seed * 100_003 + len(history)) % 2**32
    samplers = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
    study = optuna.create_study(sampler=samplers[sampler](seed=number))
    places = _places([rank for _, rank in history])
    for (point, _), place in zip(history, places, strict=True):
        params = dict(zip(axes, point, strict=True))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=axes, value=place))
    return tuple(study.ask(axes).params[name] for name in axes)


def _places(ranks: Sequence[Rank]) -> list[float]:
    """From 0 for the best; equals share a place."""
    order = sorted(set(ranks))
    return [float(order.index(rank)) for rank in ranks]
