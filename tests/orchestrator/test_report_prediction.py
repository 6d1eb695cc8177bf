"""Predictions in a report: what `bigbatch predict` says of the same study, drawn, or a line on why it says nothing."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.batch_law.law import Law
from orchestrator.predict.command import predict
from orchestrator.predict.hardware import DEFAULT, OWN
from orchestrator.report import outlook
from orchestrator.report.evidence import evidence
from orchestrator.report.figures import draw
from orchestrator.report.figures_prediction import fan, time_and_cost
from orchestrator.report.load import load
from orchestrator.report.summary import Summary, summarise
from tests.orchestrator.made_study import MadeStudy
from tests.orchestrator.predict_studies import BATCHES, LAW, study

FIGURES = {"prediction": fan, "time_and_cost": time_and_cost}


def summary(path: Path) -> Summary:
    return summarise(load(path, None))


def texts(drawn: dict[str, dict[str, bytes]], name: str) -> str:
    return " ".join(ET.fromstring(drawn[name]["svg"]).itertext())


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps and step times of a known law, with noise of 5 %."""
    return study(tmp_path_factory.mktemp("known") / "study", noise=0.05)


def test_the_fan_holds_the_truth_and_widens(known: Path) -> None:
    (one,) = outlook.outlooks(summary(known)).arms
    assert one.batches[0] == BATCHES[0] and one.batches[-1] == 16 * BATCHES[-1] == one.refused
    for batch, ahead in zip(one.batches, one.ahead, strict=True):
        assert ahead.low < LAW.steps(batch) < ahead.high
    widths = {batch: math.log(a.high / a.low) for batch, a in zip(one.batches, one.ahead, strict=True)}
    within = max(w for batch, w in widths.items() if batch <= BATCHES[-1])
    far = [w for batch, w in widths.items() if batch > 4 * BATCHES[-1]]
    assert far and min(far) > within + 2 * 0.65  # the error found there, on both sides


def test_it_is_what_the_command_says(known: Path) -> None:
    """Steps, seconds on the study's own network, and the front on the default one."""
    made, workers = summary(known), ",".join(map(str, outlook.WORKERS))
    (one,) = outlook.outlooks(made).arms
    ((own,), _) = predict([known], "1", batches=",".join(map(str, one.batches)), hardware=OWN)
    assert [row.seconds for row in own.rows] == [seconds for _, seconds in outlook.times_ahead(made)["sgd"]]
    for row, ahead in zip(own.rows, one.ahead, strict=True):
        assert row.steps.value == ahead.value
        assert (ahead.low, ahead.high) == pytest.approx((row.steps.low, row.steps.high), rel=0.1)  # by other draws
    told = json.loads(evidence(made))["predictions"]
    assert [one["seconds"] for one in told] == [asdict(row.seconds) for row in own.rows]
    assert set(told[0]["trials"]) == {p.name for p in (known / "trials").iterdir()}
    ((front,), _) = predict([known], workers, hardware=DEFAULT)
    offered = outlook.offers(made)["sgd"]
    assert [(o.workers, o.batch, o.seconds) for o in offered] == [
        (r.load.workers, r.batch, r.seconds) for r in front.rows
    ]
    assert {(o.workers, o.batch) for o in offered if o.optimum} == {
        (r.load.workers, r.batch) for r in front.optima.values()
    }


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats_in_both(points: list[tuple[float, float]]) -> None:
    chosen = outlook.front(points)
    assert chosen == sorted(chosen, key=lambda i: points[i][0])
    for i, (time, cost) in enumerate(points):
        better = [p for p in points if p[0] <= time and p[1] <= cost and p != (time, cost)]
        assert (i in chosen) <= (not better)
        assert bool(better) or (time, cost) in [points[j] for j in chosen]


def test_figures_and_captions(known: Path) -> None:
    made = summary(known)
    drawn = draw(made, FIGURES)
    said = texts(drawn, "prediction")
    for label in ("steps to target", "seconds to target", "measured", "refused", "10000"):
        assert label in said
    assert " x " in texts(drawn, "time_and_cost")  # workers x batch size, of the optima
    told = outlook.fan_caption(made)[1]
    assert "x1.19 up to 2 times it, x1.32 up to 4 times it and x1.92 up to 16 times it" in told
    assert "more than 16 times it" in told and "1 worker, on the hardware and network of the study" in told
    assert "`bigbatch predict --workers 1,4,16,64`" in outlook.cost_caption(made)[1]
    assert outlook.unsaid(made) == []


def test_a_bound_in_the_place_of_the_law_is_told(tmp_path: Path) -> None:
    made = summary(study(tmp_path, batches=BATCHES[:4], law=Law(steps_min=400, critical=100_000), noise=0.02))
    (one,) = outlook.outlooks(made).arms
    bound = one.steps.estimate.bound
    assert bound and bound[0] == "at least"
    assert "Not identified, so its bound is taken as B_crit: sgd" in outlook.fan_caption(made)[1]


def test_too_few_batch_sizes(tmp_path: Path) -> None:
    made = summary(study(tmp_path, batches=BATCHES[:2]))
    assert draw(made, FIGURES) == {}
    assert outlook.unsaid(made) == [
        "No prediction for sgd: the target was reached at fewer than three batch sizes, too few for a law to predict from.",
        "No front of time and cost: none is predicted, and what was measured ran on 1 worker, so that cost follows time.",
    ]


def test_steps_without_times(tmp_path: Path) -> None:
    """Every pass over the same micro-batch: nothing tells how its time grows."""
    made = summary(study(tmp_path, micro_batch=32))
    drawn = draw(made, FIGURES)
    assert drawn.keys() == {"prediction"} and "seconds" not in texts(drawn, "prediction")
    first, second = outlook.unsaid(made)
    assert re.match(r"No prediction of times for sgd: step times of one local batch size; two or more", first)
    assert str(tmp_path) not in first and second.startswith("No front of time and cost")


def test_two_workers_alone_have_times_on_two_workers_and_no_front(tmp_path: Path) -> None:
    made = summary(study(tmp_path, workers=2))
    drawn = draw(made, FIGURES)
    assert drawn.keys() == {"prediction"} and "seconds to target" in texts(drawn, "prediction")
    assert "2 workers, on the hardware and network of the study" in outlook.fan_caption(made)[1]
    assert outlook.unsaid(made) == [
        "No prediction of times on other workers or networks for sgd: no trial ran on 1 worker, so computing and traffic "
        "cannot be told apart.",
        "No front of time and cost: none is predicted, and what was measured ran on 2 workers, so that cost follows time.",
    ]


def test_without_predictions_the_front_is_of_what_was_measured(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path)
    for workers in (1, 4):
        for batch, steps in ((32, 300), (64, 200)):
            seconds = steps * batch / workers / 1000
            target = {"metric": "test_accuracy", "value": 0.95, "reached": True, "step": steps, "seconds": seconds}
            made.add("one" if workers == 1 else "four", batch, 0, steps, workers=workers, target=target)
    found = summary(tmp_path)
    offered = {arm: [(o.batch, o.workers, o.cost) for o in own] for arm, own in outlook.offers(found).items()}
    assert offered == {"one": [(32, 1, 9.6), (64, 1, 12.8)], "four": [(32, 4, 9.6), (64, 4, 12.8)]}
    assert draw(found, FIGURES).keys() == {"time_and_cost"}
    assert "as measured" in outlook.cost_caption(found)[1] and len(outlook.unsaid(found)) == 2


def test_a_study_without_a_target_is_asked_for_nothing(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path, target=None)
    made.add("sgd", 32, 0)
    assert outlook.unsaid(summary(tmp_path)) == [] and draw(summary(tmp_path), FIGURES) == {}
