"""Oracles of the noise estimators: by hand, as identities, and on gradients whose noise is known."""

from __future__ import annotations

from itertools import permutations
from math import inf, sqrt

import numpy as np
import pytest
from numpy.typing import NDArray

from strategies.parts.gradient_noise import Noise, estimate, pooled, saturated, signal_variance, steps_needed

Array = NDArray[np.float64]
SIGNAL, TRACE, DIMENSION = 4.0, 2029.426, 1000


def of(gradients: Array, sizes: list[int]) -> Noise:
    """(parts, d) gradients -> their noise."""
    mean = np.average(gradients, axis=0, weights=sizes)
    return estimate([float(g @ g) for g in gradients], sizes, float(mean @ mean))


def test_by_hand() -> None:
    """s = 7, |g|^2 = 5."""
    noise = of(np.array([[1.0, 2.0], [3.0, 0.0]]), [4, 4])
    assert (noise.trace, noise.signal) == (16, 3)
    assert noise.scale == pytest.approx(16 / 3, abs=1e-15)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_identities_for_equal_parts(parts: int) -> None:
    """trace = (s - |g|^2) / (1/b - 1/B) = b/(W-1) sum |g_i - g|^2; signal = (B |g|^2 - b s) / (B - b) = mean of g_i . g_j."""
    gradients, b = np.random.default_rng(parts).normal(size=(parts, 5)), 6
    mean, noise = gradients.mean(axis=0), of(gradients, [b] * parts)
    s, big, examples = float((gradients**2).sum(axis=1).mean()), float(mean @ mean), b * parts
    assert noise.trace == pytest.approx((s - big) / (1 / b - 1 / examples), rel=1e-13)
    assert noise.trace == pytest.approx(b / (parts - 1) * float(((gradients - mean) ** 2).sum()), rel=1e-13)
    assert noise.signal == pytest.approx((examples * big - b * s) / (examples - b), abs=1e-13)
    products = [float(x @ y) for x, y in permutations(gradients, 2)]
    assert noise.signal == pytest.approx(sum(products) / len(products), abs=1e-13)


def test_two_parts() -> None:
    one, other = np.random.default_rng(0).normal(size=(2, 5))
    noise = of(np.array([one, other]), [3, 3])
    assert noise.trace == pytest.approx(1.5 * float((one - other) @ (one - other)), rel=1e-13)
    assert noise.signal == pytest.approx(float(one @ other), rel=1e-13)


def test_parts_of_unequal_size_are_unbiased() -> None:
    """Per-example noise of trace 10 around a gradient with |G|^2 = 1, in parts of 2, 3 and 7."""
    rng, sizes, true = np.random.default_rng(1), [2, 3, 7], np.full(4, 0.5)
    draws = [of(np.array([true + rng.normal(size=4) * sqrt(2.5 / b) for b in sizes]), sizes) for _ in range(20_000)]
    for values, expected in (([n.trace for n in draws], 10.0), ([n.signal for n in draws], 1.0)):
        assert abs(np.mean(values) - expected) < 4 * np.std(values) / sqrt(len(values))


def spectrum() -> Array:
    shape = ((np.arange(DIMENSION) + 0.5) / DIMENSION) ** 1.5
    return TRACE * shape / shape.sum()


def draw(parts: int, size: int, repeats: int) -> tuple[Array, Array]:
    """Estimates of trace and signal, (repeats,) each, for gradients with |G|^2 = 4 and the spectrum above."""
    rng, scale = np.random.default_rng(parts), np.sqrt(spectrum() / size)
    noises = []
    for _ in range(repeats):
        g = rng.standard_normal((parts, DIMENSION)) * scale + sqrt(SIGNAL / DIMENSION)
        noises.append(of(g, [size] * parts))
    return np.array([n.trace for n in noises]), np.array([n.signal for n in noises])


@pytest.mark.parametrize(("parts", "size", "repeats"), [(2, 8, 10_000), (8, 32, 4_000)])
def test_synthetic_gradients(parts: int, size: int, repeats: int) -> None:
    """Both estimates lie within 4 standard errors of the truth, and scatter as the formula says."""
    trace, signal = draw(parts, size, repeats)
    assert abs(trace.mean() - TRACE) < 4 * trace.std() / sqrt(repeats)
    assert abs(signal.mean() - SIGNAL) < 4 * signal.std() / sqrt(repeats)
    values = spectrum()
    along, squared = SIGNAL / DIMENSION * values.sum(), float((values**2).sum())
    expected = signal_variance(along, squared, size, parts)
    assert signal.var() == pytest.approx(expected, rel=0.1)
    error = sqrt(expected / repeats) / SIGNAL
    effective = TRACE**2 / squared
    assert steps_needed(error, TRACE / SIGNAL, size, parts, DIMENSION, effective) == pytest.approx(repeats, rel=1e-9)


def test_never_average_ratios() -> None:
    """True scale 507.4. A third of the signals is negative at two parts of 8, and the mean of ratios is of no use."""
    trace, signal = draw(2, 8, 10_000)
    assert 0.30 < (signal < 0).mean() < 0.38
    whole = pooled(map(Noise, trace.tolist(), signal.tolist()))
    assert whole.scale == pytest.approx(TRACE / SIGNAL, rel=0.15)
    assert abs((trace / signal).mean() / (TRACE / SIGNAL) - 1) > 0.5


@pytest.mark.parametrize("distance", [0.5, 1.0, 3.0])
def test_quadratic_along_its_path(distance: float) -> None:
    """L = mean 0.5 |w - x_i|^2: G = w - mu, Sigma = C, so B_simple = tr C / |w - mu|^2."""
    rng, spread = np.random.default_rng(2), np.array([1.0, 0.5, 0.25, 0.25])
    w = np.array([0.0, 0.0, distance, 0.0])
    batches = w - rng.normal(size=(4000, 8, 4, 4)) * np.sqrt(spread)
    whole = pooled(of(batch.mean(axis=1), [4] * 8) for batch in batches)
    assert whole.scale == pytest.approx(2.0 / distance**2, rel=0.05)


def test_identical_parts_have_no_noise() -> None:
    noise = of(np.ones((3, 2)), [5, 5, 5])
    assert (noise.trace, noise.signal, noise.scale) == (0, 2, 0)
    assert Noise(1.0, -0.5).scale == inf == Noise(1.0, 0.0).scale


def test_one_part_tells_nothing() -> None:
    with pytest.raises(ValueError, match="at least 2 parts of a batch, got 1"):
        estimate([1.0], [4], 1.0)


def test_saturation() -> None:
    assert saturated(251, 1000) and not saturated(250, 1000)
