"""The eight laws that every strategy obeys (docs/architecture.md), in float64, so tight that a wrong factor cannot hide."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.compose import check
from orchestrator.identity import canonical
from strategies import CATALOGUE
from strategies.contract import Need, Plan, PlanError
from tests.strategies.cases import CASES
from tests.strategies.harness import Blobs, Pair, Trained, baseline, distance, train

EXACT = 1e-12
every_strategy = pytest.mark.parametrize("name", sorted(CATALOGUE))


def edited(name: str, plan: Plan | None = None, neutral: bool = False) -> Plan:
    options = CASES[name].neutral if neutral else CASES[name].acts
    return CATALOGUE[name](**options).edit(plan or baseline())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "rendezvous")
    yield pair
    pair.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(baseline(), tmp_path_factory.mktemp("plain"))


def test_every_strategy_has_a_case() -> None:
    assert CASES.keys() == CATALOGUE.keys()


@every_strategy
def test_1_neutral_equals_baseline(name: str, tmp_path: Path, plain: Trained) -> None:
    assert distance(train(edited(name, neutral=True), tmp_path), plain) < EXACT


@every_strategy
def test_1_acting_differs_from_baseline(name: str, tmp_path: Path, plain: Trained) -> None:
    """Without this, a strategy that does nothing would pass all laws."""
    assert distance(train(edited(name), tmp_path), plain) > 1e-6


@every_strategy
def test_2_micro_batches_equal_one_batch(name: str, tmp_path: Path) -> None:
    whole = train(edited(name), tmp_path / "whole")
    parts = train(edited(name), tmp_path / "parts", micro_batch=5)  # 12 = 4 + 4 + 4; see below for unequal parts
    uneven = train(edited(name, baseline(batch=11)), tmp_path / "uneven", micro_batch=4)  # 3 + 4 + 4
    assert distance(whole, parts) < EXACT
    assert distance(uneven, train(edited(name, baseline(batch=11)), tmp_path / "eleven")) < EXACT


@every_strategy
def test_3_two_workers_equal_one(name: str, tmp_path: Path, pair: Pair) -> None:
    for batch in (12, 11):  # 11: shares of 5 and 6
        plan = edited(name, baseline(batch=batch))
        alone = train(plan, tmp_path / f"one{batch}")
        both = pair.train(plan, tmp_path / f"two{batch}")
        split = pair.train(plan, tmp_path / f"split{batch}", micro_batch=2)
        assert distance(alone, both) < EXACT
        assert distance(alone, split) < EXACT
        losses = [[row["train_loss"] for row in t.rows] for t in (alone, both)]
        assert losses[0] == pytest.approx(losses[1], abs=EXACT)


@every_strategy
@pytest.mark.parametrize("killed_at", [0, 1, 5, 11])
def test_4_resumed_equals_uninterrupted(name: str, killed_at: int, tmp_path: Path) -> None:
    unbroken = train(edited(name), tmp_path / "unbroken")
    data = Blobs(fail_at=killed_at * 12)
    with pytest.raises(InterruptedError):
        train(edited(name), tmp_path / "broken", data, save_seconds=0)
    resumed = train(edited(name), tmp_path / "broken", data, save_seconds=0)
    assert distance(resumed, unbroken) == 0
    strip = [{k: v for k, v in row.items() if "second" not in k} for row in resumed.rows]
    assert strip == [{k: v for k, v in row.items() if "second" not in k} for row in unbroken.rows]


@every_strategy
def test_5_edit_is_pure_and_the_plan_prints(name: str) -> None:
    plan = baseline()
    before = canonical(plan)
    once, again = edited(name, plan), edited(name, plan)
    assert canonical(plan) == before
    assert once == again
    assert canonical(once) == canonical(again) != before


@every_strategy
def test_6_needs_are_honest(name: str) -> None:
    plan = edited(name)
    check(plan, "solo")
    with pytest.MonkeyPatch.context() as patch:
        for need in plan.needs:
            patch.setattr("orchestrator.compose.OFFERS", {"poor": ~need})
            with pytest.raises(PlanError, match=str(need.name)):
                check(plan, "poor")
        patch.setattr("orchestrator.compose.OFFERS", {"just": plan.needs or Need.NOTHING})
        check(plan, "just")


@every_strategy
def test_7_the_loss_falls(name: str, tmp_path: Path) -> None:
    rows = train(edited(name, baseline(epochs=10)), tmp_path).rows
    assert rows[-1]["test_loss"] < 0.5 * rows[0]["train_loss"]


@every_strategy
def test_8_repeated_examples_change_nothing(name: str, tmp_path: Path) -> None:
    once = train(edited(name, baseline(batch=12)), tmp_path / "once")
    twice = train(edited(name, baseline(batch=24)), tmp_path / "twice", Blobs(repeat=2))
    assert distance(once, twice) < EXACT


def test_strategies_commute(tmp_path: Path) -> None:
    """All orders of all strategies: the same weights."""
    results = []
    for i, order in enumerate(itertools.permutations(sorted(CATALOGUE))):
        plan = baseline()
        for name in order:
            plan = edited(name, plan)
        results.append(train(plan, tmp_path / str(i)))
    assert max(distance(results[0], other) for other in results[1:]) < EXACT
