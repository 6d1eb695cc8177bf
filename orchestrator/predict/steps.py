"""Steps to target at any batch size, as draws: from the fitted law, or from the bound where the law is not identified."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.batch_law.censored import Array
from orchestrator.batch_law.fit import log_shape, profile
from orchestrator.batch_law.intervals import Estimate, band, estimate, point_bootstrap
from orchestrator.batch_law.law import Law, Point
from orchestrator.files import Damaged
from orchestrator.statistics import LEVEL

TAILS = (1 - LEVEL) / 2, (1 + LEVEL) / 2


@dataclass(frozen=True)
class Steps:
    law: Law  # at the bound, if it is not identified
    estimate: Estimate

    @property
    def reached(self) -> Array:
        """Batch sizes that the law rests on, rising."""
        at = self.estimate.at
        return at.batches[np.isfinite(at.upper)]

    @property
    def scatter(self) -> float:
        """Of one batch size about the law, on the log scale; the law has two parameters."""
        n = self.estimate.at.hits
        return self.estimate.fit.rms * math.sqrt(n / (n - 2))

    def draws(self, batches: Sequence[float], count: int) -> Array:
        """ln S, shape (count, batches), of the law and not of single trials.

        Draws of the point bootstrap, stretched about the law to the interval of the profile likelihood where that is wider.
        """
        at = self.estimate.at
        log_critical, log_steps = point_bootstrap(at, count)
        log_s = log_steps[:, None] + log_shape(np.array(batches, dtype=float), log_critical)
        centre = np.log([self.law.steps(b) for b in batches])
        away, (low, high) = log_s - centre, np.quantile(log_s, TAILS, axis=0) - centre
        ends = np.log([(i.low, i.high) for i in band(at, batches)]).T - centre
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = ends / np.stack([low, high])
        down, up = np.where(np.isfinite(ratio), np.maximum(ratio, 1.0), 1.0)
        return centre + np.where(away < 0, away * down, away * up)


def steps_of(points: Sequence[Point], where: str) -> Steps:
    """Raises Damaged where neither the law nor a bound of it is known."""
    return steps_by(estimate(points), where)


def steps_by(found: Estimate | None, where: str) -> Steps:
    """As `steps_of`, of points that a law was fitted to, or None where they were too few."""
    if found is None:
        raise Damaged(
            f"{where}: the target was reached at fewer than three batch sizes, too few for a law to predict from"
        )
    if found.identified:
        return Steps(found.fit.law, found)
    if found.bound is None:
        raise Damaged(f"{where}: B_crit is neither identified nor bounded: {'; '.join(found.reasons)}")
    log_critical = math.log(found.bound[1])
    log_steps = profile(found.at, np.array([log_critical]))[1]
    return Steps(Law(math.exp(log_steps[0]), found.bound[1]), found)
