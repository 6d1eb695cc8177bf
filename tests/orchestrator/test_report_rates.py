"""Best learning rates of made-up studies: which rate, where it lies in its box, how it grows, and the figure of it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from orchestrator.report.best_rates import BestRate, best_rates, caption, exponent, guide, unsaid
from orchestrator.report.figures import draw
from orchestrator.report.figures_rates import rates
from orchestrator.report.load import load
from orchestrator.report.summary import Summary, summarise
from orchestrator.search import space
from tests.orchestrator.made_study import MadeStudy
from tests.orchestrator.test_search_points import recipe


def summary(made: MadeStudy) -> Summary:
    return summarise(load(made.path, None))


def searched(path: Path, winners: dict[int, float], edge: str | None = None) -> MadeStudy:
    """Three points at each batch size, of which the winner is trained again; `edge` is told of the last one."""
    made = MadeStudy(path)
    for batch, best in winners.items():
        for rate in (best / 2, best, best * 2):
            made.add("sgd", batch, 0, 100 if rate == best else 200, point=at(batch, rate), role="tuning")
        told = edge if batch == max(winners) else None
        made.add("sgd", batch, 1, 110, point=at(batch, best), role="winner", edge=told)
    return made


def at(batch: int, rate: float) -> dict[str, float]:
    return {"base.batch": batch, "base.rate.peak": rate}


def test_the_rate_of_each_winner(tmp_path: Path) -> None:
    made = searched(tmp_path, {32: 0.1, 64: 0.2, 128: 0.3}, "base.rate.peak 0.3 at the upper edge of [0.01, 0.3]")
    found = best_rates(summary(made))
    told = [(r.batch, r.rate, r.edge) for r in found["sgd"]]
    assert told == [(32, 0.1, None), (64, 0.2, None), (128, 0.3, "upper")]
    assert [r.trials for r in found["sgd"]] == [(made.ids[i],) for i in (3, 7, 11)]  # the winners


def test_scaling_rules_enter(tmp_path: Path) -> None:
    """What was searched is the rate at batch size `per`: 0.1 at 32 is 0.4 at 128 by the linear rule."""
    made = searched(tmp_path, {32: 0.1, 128: 0.1})
    for config in tmp_path.glob("trials/*/config.json"):
        content: dict[str, Any] = json.loads(config.read_text())
        content["base"]["rate"] = {"peak": 5.0, "per": 32, "scale": "linear"}
        config.write_text(json.dumps(content))
    assert [r.rate for r in best_rates(summary(made))["sgd"]] == pytest.approx([0.1, 0.4])


def test_in_a_grid_the_ends_are_edges(tmp_path: Path) -> None:
    made = MadeStudy(tmp_path)
    for batch, best in {32: 0.1, 64: 0.2, 128: 0.4}.items():
        for rate in (0.1, 0.2, 0.4):
            made.add("sgd", batch, 0, 100 if rate == best else 200, point=at(batch, rate))
    assert [r.edge for r in best_rates(summary(made))["sgd"]] == ["lower", None, "upper"]


def test_nothing_where_no_rate_was_chosen_at_two_batch_sizes(tmp_path: Path) -> None:
    for name, winners in (("one", {32: 0.1}), ("none", {})):
        made = searched(tmp_path / name, winners)
        made.add("plain", 32, 0, 100)
        made.add("plain", 64, 0, 60)
        found = summary(made)
        assert best_rates(found) == {} and draw(found, {"best_rate": rates}) == {}
        assert unsaid(found) == [
            "No figure of the best rates: each arm's rate was chosen at one batch size at most."
        ] * len(winners)


def rate(batch: int, value: float, edge: str | None = None) -> BestRate:
    return BestRate("sgd", (), batch, value, edge)


def test_exponents_leave_out_edges() -> None:
    """Square roots exactly, save at the edge of the box, which cuts the last one off."""
    inside = [rate(batch, 0.01 * batch**0.5) for batch in (32, 64, 128)]
    assert exponent([*inside, rate(256, 0.12, "upper")]) == pytest.approx(0.5, abs=1e-12)
    assert exponent(inside[:2]) is None


def test_guides_start_at_the_smallest_batch_size() -> None:
    own = [rate(32, 0.1), rate(128, 0.7)]
    assert guide(own, 1.0) == pytest.approx([0.1, 0.4]) and guide(own, 0.5) == pytest.approx([0.1, 0.2])


def test_the_figure_and_its_caption(tmp_path: Path) -> None:
    edge = "base.rate.peak 0.9 at the lower edge of [0.9, 9]"
    found = summary(searched(tmp_path, {32: 0.1, 64: 0.2, 128: 0.4, 256: 0.9}, edge))
    svg = draw(found, {"best_rate": rates})["best_rate"]["svg"]
    text = "".join(ET.fromstring(svg).itertext())
    for label in ("in proportion to the batch", "to its square root", "at the edge of what was tried", "256"):
        assert label in text
    title, told = caption(found)
    assert title == "Best learning rate against batch size"
    assert "to the power of sgd 1.00" in told and "Open triangles: 1 at the edge" in told


def test_the_side_is_read_from_the_words_of_the_search() -> None:
    """Of several paths the right one, whatever stands before it."""
    search = recipe().search
    assert search
    for peak, momentum, sides in ((0.0101, 0.9899, ("lower", "upper")), (9.9, 0.95, ("upper", None))):
        told = "; ".join(space.edges(search, {"base.rate.peak": peak, "base.optimizer.sgd.momentum": momentum}))
        assert (space.side(told, "base.rate.peak"), space.side(told, "base.optimizer.sgd.momentum")) == sides
    assert space.side("", "base.rate.peak") is None
