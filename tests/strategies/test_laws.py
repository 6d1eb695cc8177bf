"""The eight laws that every strategy obeys (docs/architecture.md), in float64, so tight that a wrong factor cannot hide."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from orchestrator.compose import check
from orchestrator.identity import canonical
from strategies import CATALOGUE
from strategies.contract import Need, Plan, PlanError
from tests.strategies import harness
from tests.strategies.cases import CASES
from tests.strategies.harness import Blobs, Pair, Trained, baseline, distance

EXACT = 1e-12
every_strategy = pytest.mark.parametrize("name", sorted(CATALOGUE))


def base(name: str, epochs: float = 3, batch: int = 12) -> Plan:
    return CASES[name].base(baseline(epochs, batch))


def edited(name: str, plan: Plan | None = None, neutral: bool = False) -> Plan:
    options = CASES[name].neutral if neutral else CASES[name].acts
    return CATALOGUE[name](**options).edit(plan or base(name))


def blobs(name: str, **options: int) -> Blobs:
    return Blobs(inputs=CASES[name].inputs, **options)  # type: ignore[arg-type]


def train(name: str, plan: Plan, directory: Path, data: Blobs | None = None, **options: float) -> Trained:
    return harness.train(plan, directory, data or blobs(name), **{"micro_batch": CASES[name].micro} | options)


def untimed(trained: Trained) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in trained.rows]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair") / "rendezvous")
    yield pair
    pair.close()


def test_every_strategy_has_a_case() -> None:
    assert CASES.keys() == CATALOGUE.keys()


@every_strategy
def test_1_neutral_equals_baseline(name: str, tmp_path: Path) -> None:
    plain = train(name, base(name), tmp_path / "plain")
    assert distance(train(name, edited(name, neutral=True), tmp_path / "neutral"), plain) < EXACT


@every_strategy
def test_1_acting_differs_from_baseline(name: str, tmp_path: Path, pair: Pair) -> None:
    """In its weights or, if it only measures, in what it logs: else a strategy that does nothing would pass all laws."""
    if CASES[name].workers == 2:
        acting, plain = pair.train(edited(name), tmp_path / "acting"), pair.train(base(name), tmp_path / "plain")
    else:
        acting, plain = train(name, edited(name), tmp_path / "acting"), train(name, base(name), tmp_path / "plain")
    assert untimed(acting) != untimed(plain) if CASES[name].measures else distance(acting, plain) > 1e-6


@every_strategy
def test_2_micro_batches_equal_one_batch(name: str, tmp_path: Path) -> None:
    for batch, micro in CASES[name].micro_batches:
        plan = edited(name, base(name, batch=batch))
        whole = train(name, plan, tmp_path / f"whole{batch}")
        parts = train(name, plan, tmp_path / f"parts{batch}_{micro}", micro_batch=micro)
        assert distance(whole, parts) < EXACT


@every_strategy
def test_3_two_workers_equal_one(name: str, tmp_path: Path, pair: Pair) -> None:
    for batch, micro in CASES[name].shares:
        plan = edited(name, base(name, batch=batch))
        alone = train(name, plan, tmp_path / f"one{batch}")
        both = pair.train(plan, tmp_path / f"two{batch}", data=blobs(name))
        split = pair.train(plan, tmp_path / f"split{batch}", data=blobs(name), micro_batch=micro)
        assert distance(alone, both) < EXACT
        assert distance(alone, split) < EXACT
        losses = [[row["train_loss"] for row in t.rows] for t in (alone, both)]
        assert losses[0] == pytest.approx(losses[1], abs=EXACT)


@every_strategy
@pytest.mark.parametrize("killed_at", [0, 1, 5, 11])
def test_4_resumed_equals_uninterrupted(name: str, killed_at: int, tmp_path: Path) -> None:
    unbroken = train(name, edited(name), tmp_path / "unbroken")
    data = blobs(name, fail_at=killed_at * 12)
    with pytest.raises(InterruptedError):
        train(name, edited(name), tmp_path / "broken", data, save_seconds=0)
    resumed = train(name, edited(name), tmp_path / "broken", data, save_seconds=0)
    assert distance(resumed, unbroken) == 0
    assert untimed(resumed) == untimed(unbroken)


@every_strategy
def test_5_edit_is_pure_and_the_plan_prints(name: str) -> None:
    plan = base(name)
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
    rows = train(name, edited(name, base(name, epochs=10)), tmp_path).rows
    assert rows[-1]["test_loss"] < 0.5 * rows[0]["train_loss"]


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if case.repeats))
def test_8_repeated_examples_change_nothing(name: str, tmp_path: Path) -> None:
    once = train(name, edited(name, base(name, batch=12)), tmp_path / "once")
    twice = train(name, edited(name, base(name, batch=24)), tmp_path / "twice", blobs(name, repeat=2))
    assert distance(once, twice) < EXACT


def in_order(names: tuple[str, ...], directory: Path) -> Trained | None:
    """Trained with these strategies applied in this order; None where they refuse each other."""
    plan = baseline(epochs=1)
    try:
        for name in sorted(names):
            plan = CASES[name].base(plan)
        for name in names:
            plan = edited(name, plan)
        data = Blobs(inputs=max((CASES[name].inputs for name in names), key=len))
        return harness.train(plan, directory, data, micro_batch=min(CASES[name].micro for name in names))
    except PlanError:
        return None


def pairs() -> list[Any]:
    """All of them; a quarter, always the same, runs with the fast tests."""
    found = itertools.combinations(sorted(CATALOGUE), 2)
    return [pytest.param(p, marks=() if crc32(" ".join(p).encode()) % 4 == 0 else pytest.mark.slow) for p in found]


@pytest.mark.parametrize("names", pairs(), ids=" ".join)
def test_strategies_commute(names: tuple[str, str], tmp_path: Path) -> None:
    """In either order: the same weights, or a refusal."""
    one, other = in_order(names, tmp_path / "one"), in_order(names[::-1], tmp_path / "other")
    assert (one is None) == (other is None)
    assert one is None or other is None or distance(one, other) < EXACT
