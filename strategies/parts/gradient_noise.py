"""Unbiased estimates of gradient noise from gradients of parts of a batch (McCandlish et al. 2018, arXiv 1812.06162).

A batch of B examples in W parts of b_i: g_i is the mean gradient of a part, g that of the batch. All that is needed are the
squared norms |g_i|^2 and |g|^2, of gradients unclipped, unscaled and without weight decay. Pure functions of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

SATURATION = 0.25  # of the data set: beyond, sampling without replacement pulls the estimate down


@dataclass(frozen=True, slots=True)
class Noise:
    trace: float  # of the per-example gradient covariance, tr(Sigma); never negative
    signal: float  # squared norm of the true gradient, |G|^2; an estimate may be negative

    @property
    def scale(self) -> float:
        """B_simple = tr(Sigma) / |G|^2, in examples; infinite where no signal was found."""
        return self.trace / self.signal if self.signal > 0 else inf


def estimate(squares: Sequence[float], sizes: Sequence[int], mean_square: float) -> Noise:
    """From |g_i|^2, b_i and |g|^2: trace = sum b_i |g_i - g|^2 / (W - 1), signal = |g|^2 - trace / B.

    With parts of one size this is the mean of g_i . g_j over i != j. Raises ValueError for fewer than two parts.
    """
    if len(sizes) < 2:
        raise ValueError(f"noise needs at least 2 parts of a batch, got {len(sizes)}: add workers, or accumulate")
    weighted = sum(b * q for b, q in zip(sizes, squares, strict=True))
    return Noise(*from_sums(weighted, len(sizes), sum(sizes), mean_square))


def from_sums(weighted: Any, parts: Any, examples: int, mean_square: Any) -> tuple[Any, Any]:
    """(trace, signal) from sum b_i |g_i|^2, W, B and |g|^2, which are numbers or () tensors."""
    trace = (weighted - examples * mean_square) / (parts - 1)
    return trace, mean_square - trace / examples


def pooled(estimates: Iterable[Noise]) -> Noise:
    """The mean of each quantity; its `scale` is a ratio of means. A mean of ratios would be far off."""
    noises = list(estimates)
    return Noise(sum(n.trace for n in noises) / len(noises), sum(n.signal for n in noises) / len(noises))


def signal_variance(along: float, squared: float, size: int, parts: int) -> float:
    """Variance of `signal` in one step for Gaussian gradients; `along` = G' Sigma G, `squared` = tr(Sigma^2)."""
    return 4 * along / (parts * size) + 2 * squared / (parts * (parts - 1) * size**2)


def steps_needed(error: float, scale: float, size: int, parts: int, dimension: float, effective: float) -> float:
    """Steps to average for a relative `error` of the signal; `effective` = tr(Sigma)^2 / tr(Sigma^2)."""
    x = scale / size
    return (4 * x / (parts * dimension) + 2 * x**2 / (parts * (parts - 1) * effective)) / error**2


def saturated(scale: float, examples: int) -> bool:
    """Whether the noise scale is too near the size of the data set to be trusted."""
    return scale > SATURATION * examples
