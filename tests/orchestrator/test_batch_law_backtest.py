"""Backtested errors of the law on the public curves, against the table published for two curves more (RNN-T, LM 151M)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrator.batch_law.backtest import REFUSED_BEYOND, Prediction, predictions, table
from orchestrator.batch_law.fit import locate, trials
from orchestrator.batch_law.law import Point
from orchestrator.batch_law.table import read
from tests.orchestrator.batch_law_curves import PUBLIC, TRUTH, made

EVERY = [one for curve in read(PUBLIC) for one in predictions(locate(trials(curve.points)))]
ROWS = {(row.up, row.nearest): row for row in table(EVERY)}

# (up, beyond): pairs and median |error| of these eight curves, and the published median of ten where 0.01 holds between the two
FOUND = {
    (True, 1): (78, 0.072, 0.074),
    (True, 2): (50, 0.166, 0.165),
    (True, 4): (50, 0.243, None),
    (True, 16): (13, 0.822, None),
    (False, 1): (67, 0.073, 0.075),
    (False, 2): (46, 0.071, 0.078),
    (False, 4): (53, 0.110, 0.12),
}


@pytest.mark.parametrize("place", FOUND)
def test_errors_by_direction_and_distance(place):
    row, (pairs, median, published) = ROWS[place], FOUND[place]
    assert row.pairs == pairs
    assert row.median == pytest.approx(median, abs=0.002)
    assert published is None or abs(row.median - published) < 0.01
    assert row.ninetieth > row.median


@pytest.mark.parametrize(("farthest", "pairs", "published"), [(2, 35, 0.058), (4, 9, 0.11)])
def test_errors_are_smaller_once_the_critical_batch_size_is_near(farthest, pairs, published):
    errors = [abs(p.error) for p in EVERY if p.up and p.reaches_half and farthest / 2 < p.distance <= farthest]
    assert len(errors) == pairs and np.median(errors) == pytest.approx(published, abs=0.01)
    assert np.median(errors) < ROWS[True, farthest / 2].median


def test_predictions_are_refused_where_they_are_off_by_a_factor():
    assert REFUSED_BEYOND == 16
    beyond, within = ROWS[True, REFUSED_BEYOND], ROWS[True, REFUSED_BEYOND / 4]
    assert beyond.median > math.log(2) > within.median and beyond.farthest == math.inf


def test_points_that_follow_the_law_are_predicted_exactly():
    found = predictions(locate(trials(made(0, trials=1, noise=0))))
    assert len(found) == 2 * sum(range(1, 9))  # 8 left out after the first three of 11, then 7, ...
    assert max(abs(p.error) for p in found) < 1e-6
    assert {p.up for p in found} == {True, False} and max(p.distance for p in found) == 2**8


def test_error_is_predicted_over_measured():
    points = [Point(b, TRUTH.steps(b), TRUTH.steps(b)) for b in (64, 256, 1024)] + [Point(2048, 625, 625)]
    (up,) = (p for p in predictions(locate(trials(points))) if p.up)
    assert up.distance == 2 and up.reaches_half
    assert up.error == pytest.approx(math.log(2), abs=1e-6)  # 1250 steps predicted


def test_classes_include_their_far_end():
    rows = table(
        [Prediction(True, 2.0, -0.1, True), Prediction(True, 2.001, 0.3, True), Prediction(False, 99.0, 0.2, True)]
    )
    assert [(r.up, r.nearest, r.pairs, r.signed) for r in rows] == [
        (True, 1, 1, -0.1),
        (True, 2, 1, 0.3),
        (False, 16, 1, 0.2),
    ]
