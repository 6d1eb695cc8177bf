"""The law against its algebra, and its fit against laws that are known and against published curves."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm

from orchestrator.batch_law.censored import log_likelihood, maximise
from orchestrator.batch_law.curve import Curve
from orchestrator.batch_law.fit import Locations, fit, fit_many, locate, trials
from orchestrator.batch_law.law import Law, Point
from orchestrator.batch_law.table import read
from tests.orchestrator.batch_law_curves import PUBLIC, TRUTH, made

# E_min, S_min, B_crit and rms log residual as published, from least squares on ln(mean steps) with equal weights
PUBLISHED = {
    "resnet50_lars": (34.7, 944, 47_066, 0.037),
    "bert_lamb": (2.34e6, 183, 12_787, 0.064),
    "ssd": (3.39, None, 1_392, 0.067),
    "gpt3": (1.05e9, None, 16_094, 0.031),
    "lm_85M": (2.83e6, 1294, 2_191, 0.049),
    "lm_302M": (11.4e6, 2095, 5_433, 0.040),
    "lm_604M": (19.4e6, 2460, 7_907, 0.044),
    "lm_1_2B": (43.4e6, 3897, 11_131, 0.038),
}
CURVES = {curve.name: curve for curve in read(PUBLIC)}


# ---------------------------------------------------------------------------------------------------------------- algebra


def test_the_law_at_known_batch_sizes():
    assert [TRUTH.steps(b) for b in (64, 512, 4096)] == [9000, 2000, 1125]
    assert TRUTH.examples(512) == 2 * TRUTH.examples_min == 2 * 512_000
    assert (TRUTH.steps(64) / 1000 - 1) * (TRUTH.examples(64) / 512_000 - 1) == pytest.approx(1, abs=1e-15)
    assert TRUTH.steps(64) / 1000 - 1 == 8 and TRUTH.examples(64) / 512_000 == 1.125


@pytest.mark.parametrize("batch", [1, 64, 512, 100_000])
def test_steps_examples_and_their_inverses(batch):
    assert TRUTH.examples(batch) == pytest.approx(batch * TRUTH.steps(batch), rel=1e-14)
    assert TRUTH.batch_for_steps(TRUTH.steps(batch)) == pytest.approx(batch, rel=1e-9)
    assert TRUTH.batch_for_examples(TRUTH.examples(batch)) == pytest.approx(batch, rel=1e-9)


def test_what_no_batch_size_reaches():
    assert TRUTH.batch_for_steps(1000) == TRUTH.batch_for_steps(900) == math.inf
    assert TRUTH.batch_for_examples(512_000) == TRUTH.batch_for_examples(1) == 0


@pytest.mark.parametrize(("critical", "useful"), [(2191, 745), (3240, 955), (5433, 1394), (7907, 1889), (11131, 2533)])
def test_batch_size_with_a_fifth_more_steps_than_perfect_scaling(critical, useful):
    law = Law(1.0, critical)
    assert round(law.useful_batch(256)) == useful
    assert law.steps(law.useful_batch(256)) == pytest.approx(1.2 * law.steps(256) * 256 / law.useful_batch(256))


# ------------------------------------------------------------------------------------------------------- censored samples


def test_censored_normal_sample_against_a_general_optimizer():
    generator = np.random.default_rng(3)
    values = generator.normal(2.0, 0.5, 40)
    lower, upper = values.copy(), values.copy()
    lower[:15], upper[:15] = np.floor(values[:15] * 2) / 2, np.ceil(values[:15] * 2) / 2
    lower[15:25], upper[15:25] = np.minimum(values[15:25], 2.3), np.where(values[15:25] > 2.3, np.inf, values[15:25])
    lower[0] = -np.inf

    def worse(parameters: np.ndarray) -> float:
        mean, scatter = parameters[0], np.exp(parameters[1])
        exact = lower == upper
        mass = norm.cdf(upper, mean, scatter) - norm.cdf(lower, mean, scatter)
        return -np.where(exact, norm.logpdf(values, mean, scatter), np.log(np.maximum(mass, 1e-300))).sum()

    best = minimize(worse, [1.0, 0.0], method="BFGS")
    assert best.success
    means, scatter, _ = maximise(lower, upper, lambda y: np.full_like(y, y.mean()))
    assert means[0] == pytest.approx(best.x[0], abs=1e-4)
    assert scatter[0] == pytest.approx(np.exp(best.x[1]), rel=1e-3)
    assert log_likelihood(lower, upper, means, scatter).sum() == pytest.approx(-best.fun, abs=1e-6)


def test_likelihood_keeps_its_digits_far_in_a_tail():
    lower, upper = np.array([40.0, -41.0, 40.0]), np.array([41.0, -40.0, np.inf])
    found = log_likelihood(lower, upper, np.zeros(3), np.ones(3))
    assert found == pytest.approx(np.full(3, norm.logsf(40.0)), rel=1e-12)


# -------------------------------------------------------------------------------------------------------------------- fit


def test_exact_data_give_the_law_back():
    found = fit(locate(trials(made(0, trials=1, noise=0))))
    assert found.law.steps_min == pytest.approx(1000, rel=1e-9)
    assert found.law.critical == pytest.approx(512, rel=1e-9)
    assert found.rms < 1e-12


@pytest.mark.parametrize("critical", [0.5, 20, 3e5])
def test_exact_data_far_from_the_middle(critical):
    law = Law(3.0, critical)
    found = fit(locate(trials(made(0, law, trials=2, noise=0)))).law
    assert found.critical == pytest.approx(critical, rel=1e-6) and found.steps_min == pytest.approx(3, rel=1e-6)


def _many(studies: int, **how: float) -> tuple[np.ndarray, np.ndarray]:
    laws = [fit(locate(trials(made(seed, **how)))).law for seed in range(studies)]
    return np.array([law.steps_min for law in laws]), np.array([law.critical for law in laws])


def test_noisy_data():
    """Means and standard deviations over studies; published: 998 with 24, 515 with 19."""
    steps, critical = _many(200)
    assert steps.mean() == pytest.approx(1000, abs=6) and steps.std() == pytest.approx(24, rel=0.15)
    assert critical.mean() == pytest.approx(512, abs=6) and critical.std() == pytest.approx(19, rel=0.2)


def test_evaluation_intervals_taken_as_such_remove_their_bias():
    """Every 250 steps: taken as exact S_min is 1127 and B_crit 452, as intervals 1003 and 508."""
    exact = [made(seed, grain=250) for seed in range(30)]
    rounded = [fit(locate(trials([Point(p.batch, p.upper, p.upper) for p in points]))).law for points in exact]
    assert np.mean([law.steps_min for law in rounded]) == pytest.approx(1127, rel=0.01)
    assert np.mean([law.critical for law in rounded]) == pytest.approx(452, rel=0.01)
    steps, critical = _many(30, grain=250)
    assert steps.mean() == pytest.approx(1000, rel=0.01) and critical.mean() == pytest.approx(512, rel=0.01)


def test_misses_count_as_misses():
    """A budget that every other trial misses at batch 64: left out, they would make small batch sizes look fast."""
    budget = TRUTH.steps(64)
    steps, critical = _many(40, budget=budget)
    assert steps.mean() == pytest.approx(1000, rel=0.015) and critical.mean() == pytest.approx(512, rel=0.015)
    hits = [[p for p in made(seed, budget=budget) if p.hit] for seed in range(40)]
    assert np.mean([fit(locate(trials(points))).law.critical for points in hits]) < 0.985 * critical.mean()


def test_the_location_of_a_batch_size():
    points = [Point(8, 90, 100), Point(8, 90, 100), Point(16, 50, math.inf), Point(16, 60, math.inf)]
    points += [Point(32, 20, 20), Point(32, 45, 45), Point(64, 0, math.inf)]
    at = locate(trials(points))
    assert at.batches.tolist() == [8, 16, 32]
    assert np.exp(at.lower) == pytest.approx([90, math.sqrt(3000), 30])
    assert np.exp(at.upper) == pytest.approx([100, math.inf, 30])
    assert at.hits == 2


def test_weights_are_trials_counted_twice():
    points = made(1, grain=100)
    weights = np.ones(len(points))
    weights[[0, 7, 7, 30]] = 2
    twice = locate(trials([p for p, w in zip(points, weights, strict=True) for _ in range(int(w))]))
    counted = locate(trials(points), weights[None])
    assert counted.lower[0] == pytest.approx(twice.lower, abs=1e-9)
    assert counted.upper[0] == pytest.approx(twice.upper, abs=1e-9)


@pytest.mark.parametrize("how", [{}, {"grain": 250.0}, {"budget": 9000.0}], ids=str)
def test_many_draws_at_once_agree_with_one_fit(how):
    at = locate(trials(made(2, **how)))
    counts = np.ones((3, len(at.batches)))
    counts[1, [0, 5]], counts[2, :3] = [2, 0], 0
    critical, steps = fit_many(at, counts)
    for row, log_critical, log_steps in zip(counts, critical, steps, strict=True):
        chosen = np.repeat(np.arange(len(row)), row.astype(int))
        law = fit(Locations(at.batches[chosen], at.lower[chosen], at.upper[chosen])).law
        assert np.exp(log_critical) == pytest.approx(law.critical, rel=0.003)
        assert np.exp(log_steps) == pytest.approx(law.steps_min, rel=0.003)


def test_too_little_to_fit():
    with pytest.raises(ValueError, match="two batch sizes"):
        fit(locate(trials([Point(8, 90, 90), Point(16, 50, math.inf)])))


# --------------------------------------------------------------------------------------------------------- public curves


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_curves_give_the_published_table(name):
    curve, (examples, steps, critical, rms) = CURVES[name], PUBLISHED[name]
    found = fit(locate(trials(curve.points)))
    assert found.law.critical == pytest.approx(critical, rel=0.01)
    assert found.law.examples_min == pytest.approx(examples, rel=0.01)
    assert found.rms == pytest.approx(rms, abs=0.0007)
    if steps is not None:
        assert curve.examples_per_unit is not None
        assert found.law.steps_min * curve.examples_per_unit == pytest.approx(steps, rel=0.01)
    else:
        assert curve.examples_per_unit is None


def test_order_and_unit_do_not_matter():
    curve = CURVES["ssd"]
    shuffled = random.Random(0).sample(list(curve.points), len(curve.points))
    other = [Point(p.batch * 7, p.lower * 1e6, p.upper * 1e6) for p in shuffled]
    found, scaled = fit(locate(trials(curve.points))).law, fit(locate(trials(other))).law
    assert scaled.critical == pytest.approx(7 * found.critical, rel=1e-6)
    assert scaled.steps_min == pytest.approx(1e6 * found.steps_min, rel=1e-6)


def test_seeds_at_one_batch_size_have_one_vote():
    points = list(CURVES["resnet50_lars"].points)
    again = points + [p for p in points if p.batch == 1632] * 9
    assert fit(locate(trials(again))).law.critical == pytest.approx(fit(locate(trials(points))).law.critical, rel=1e-6)


@pytest.mark.parametrize(
    ("unit", "examples"),
    [
        ("examples", 1),
        ("samples", 1),
        ("epochs (1,281,167 images each)", 1_281_167),
        ("epochs", None),
        ("tokens", None),
    ],
)
def test_examples_in_a_unit(unit, examples):
    assert Curve("c", [], unit).examples_per_unit == examples
