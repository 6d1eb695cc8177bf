"""Trials that are given up: exact pruning changes no winner, heuristics compare like with like, and the trainer obeys."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.recipe.search_schema import Prune
from orchestrator.recipe.workload_schema import Interval, Target
from orchestrator.results import Deadline, outcome
from orchestrator.search import prune, winners
from orchestrator.workloads.noisy_quadratic import steps_to_target
from strategies.contract import Plan
from strategies.rate import Rate
from tests.strategies.harness import Blobs, Pair, baseline, train

TARGET = Target(test_loss=0.5)
EXACT = Prune.model_validate("exact")
Row = dict[str, Any]


def curve(values: list[float], every: int = 5) -> list[Row]:
    """Rows with the loss at each evaluation; an epoch is ten steps."""
    return [{"step": every * (i + 1), "epoch": every * (i + 1) / 10, "test_loss": v} for i, v in enumerate(values)]


def result(rows: list[Row], status: str = "done") -> dict[str, Any]:
    return {"status": status, "steps": rows[-1]["step"], "rows": rows, **outcome(rows, TARGET)}


def trained(rows: list[Row], deadlines: tuple[Deadline, ...]) -> dict[str, Any]:
    """What the trainer would make of a curve: see test_the_trainer_gives_up for the trainer's own."""
    for n, row in enumerate(rows, start=1):
        seen = rows[:n]
        late = [
            d for d in deadlines if d.step <= row["step"] and not any(r["test_loss"] <= d.target.value for r in seen)
        ]
        if late and n < len(rows):
            return result(seen, "pruned")
    return result(rows)


def search(curves: list[list[Row]], rule: Prune) -> list[dict[str, Any]]:
    """Trials one after the other, each told what the ones before it have reached."""
    results: list[dict[str, Any]] = []
    for rows in curves:
        results.append(trained(rows, prune.deadlines(rule, TARGET, results, lambda r: r["rows"])))
    return results


CURVES = st.lists(st.lists(st.floats(0, 2), min_size=12, max_size=12), min_size=1, max_size=12)


@given(values=CURVES, order=st.randoms(use_true_random=False))
def test_exact_pruning_changes_neither_the_minimum_nor_the_winner(values: list[list[float]], order: Any) -> None:
    order.shuffle(values)
    curves = [curve(v) for v in values]
    full, pruned = search(curves, Prune.model_validate("none")), search(curves, EXACT)
    assert min(map(winners.steps, pruned)) == min(map(winners.steps, full))
    assert winners.best([[r] for r in pruned]) == winners.best([[r] for r in full])
    assert sum(r["steps"] for r in pruned) <= sum(r["steps"] for r in full)
    assert all(prune.stands(EXACT, r, pruned) for r in pruned)


def test_exact_pruning_on_the_noisy_quadratic_keeps_less_than_half_of_the_steps() -> None:
    """Thirty rates one after the other, in random orders: the minimum stays, to the step."""
    budget, kept = 4000, 0
    rates = np.geomspace(0.02, 1.9, 30)
    steps = [steps_to_target(float(r), 64, 0.05, 100) or budget + 1 for r in rates]
    for seed in range(20):
        done: list[dict[str, Any]] = []
        for i in np.random.default_rng(seed).permutation(30):
            end = min([budget, *(d.step for d in prune.deadlines(EXACT, TARGET, done, list))])
            hit = {"reached": steps[i] <= end, "step": steps[i]}
            status = "pruned" if end < min(steps[i], budget) else "done"
            done.append({"status": status, "steps": min(end, steps[i]), "target": hit, "final": {}})
        assert min(map(winners.steps, done)) == min(steps)
        kept += sum(r["steps"] for r in done)
    assert kept < 0.5 * 20 * sum(min(s, budget) for s in steps)


def test_exact_pruning_waits_for_the_first_hit_and_takes_a_tie() -> None:
    slow, fast = curve([1, 1, 1, 0.4]), curve([1, 0.4, 0.4, 0.4])
    assert prune.deadlines(EXACT, TARGET, [result(curve([1, 1]))], list) == ()
    (deadline,) = prune.deadlines(EXACT, TARGET, [result(slow), result(fast)], list)
    assert (deadline.step, deadline.target) == (10, TARGET)
    assert [r["status"] for r in search([fast, fast, slow], EXACT)] == ["done", "done", "pruned"]


def test_a_verdict_falls_with_its_grounds() -> None:
    """What was given up is trained on where the best that it could not beat is gone, or the rule is another one."""
    given_up, best = result(curve([1, 1]), "pruned"), result(curve([1, 0.4]))
    assert prune.stands(EXACT, given_up, [best, given_up])
    assert not prune.stands(EXACT, given_up, [given_up])
    assert not prune.stands(EXACT, given_up, [result(curve([1, 1, 0.4]))])
    assert not prune.stands(Prune.model_validate("none"), given_up, [best])
    median = Prune.model_validate("median")
    kept = given_up | {"pruned_by": prune.terms(median, given_up)}
    assert prune.stands(median, kept, [])
    assert not prune.stands(Prune.model_validate({"median": {"startup": 4}}), kept, [])


def test_a_verdict_of_a_heuristic_stands_whatever_becomes_of_its_grounds() -> None:
    given_up = result(curve([1, 1]), "pruned")
    asha = Prune.model_validate({"asha": {"grace": 1, "factor": 2}})
    kept = given_up | {"pruned_by": prune.terms(asha, given_up)}
    assert prune.stands(asha, kept, []) and not prune.stands(EXACT, given_up, [])
    assert not prune.stands(Prune.model_validate({"asha": {"grace": 1, "factor": 3}}), kept, [])
    assert not prune.stands(asha, kept | {"target": given_up["target"] | {"metric": "test_accuracy"}}, [])


def test_asha_lets_one_in_so_many_go_on() -> None:
    rule = Prune.model_validate({"asha": {"grace": 1, "factor": 2}})
    level = [curve([v] * 12) for v in (0.9, 0.8, 0.7, 0.6)]
    found = prune.deadlines(rule, TARGET, [result(rows) for rows in level], lambda r: r["rows"])
    assert [(d.step, d.target.value) for d in found] == [
        (10, 0.7),
        (20, 0.7),
        (40, 0.7),
    ]  # the best 2 of 5, at each rung
    assert prune.deadlines(rule, TARGET, [], list) == ()
    statuses = [r["status"] for r in search([curve([v] * 12) for v in (0.6, 0.9, 0.8, 0.55)], rule)]
    assert statuses == ["done", "pruned", "pruned", "done"]
    ends = [r["steps"] for r in search([curve([v] * 12) for v in (0.6, 0.9)], rule)]
    assert ends == [60, 10]


def test_a_diverged_trial_counts_as_the_worst_and_one_given_up_only_as_far_as_it_came() -> None:
    rule = Prune.model_validate({"median": {"grace": 0, "startup": 3}})
    others = [result(curve([0.9] * 4)), result(curve([0.8] * 4)), result(curve([0.7]), "diverged")]
    found = prune.deadlines(rule, TARGET, others, lambda r: r["rows"])
    assert [(d.step, d.target.value) for d in found] == [(5, 0.8), (10, 0.9), (15, 0.9), (20, 0.9)]
    others[2] = result(curve([0.7]), "pruned")
    assert [d.step for d in prune.deadlines(rule, TARGET, others, lambda r: r["rows"])] == [5]


# ---------------------------------------------------------------------------------------------------------- the trainer

NEVER, AT_ONCE = Target(train_loss=0.0), Target(train_loss=1e9)


def test_the_trainer_gives_up_at_the_first_row_from_the_deadline_on(tmp_path: Path) -> None:
    pruned = train(baseline(), tmp_path, deadlines=(Deadline(5, NEVER), Deadline(2, AT_ONCE)))
    assert pruned.progress.status == "pruned" and pruned.progress.steps == 5 == pruned.rows[-1]["step"]
    assert not list((tmp_path / "phases").glob("*")), "an unfinished phase was kept as a finished one"
    again = train(baseline(), tmp_path)
    alone = train(baseline(), tmp_path / "alone")
    assert again.progress.status == "done" and again.progress.reused_steps == 0
    assert [r["train_loss"] for r in again.rows] == [r["train_loss"] for r in alone.rows]


def test_a_deadline_that_was_met_is_no_matter_after_a_resume_either(tmp_path: Path) -> None:
    """The rows before the checkpoint count, also where the loss has risen since."""
    (phase,) = baseline().phases
    learner = dataclasses.replace(phase.learner, rate=Rate(4.0))  # type: ignore[type-var]
    plan = Plan((dataclasses.replace(phase, learner=learner),))
    losses = [row["train_loss"] for row in train(plan, tmp_path / "alone").rows]
    assert losses[3] < min(losses[:3]) and losses[3] < losses[4]
    for name, level, status in (("met", losses[3], "done"), ("missed", losses[3] / 2, "pruned")):
        deadlines = (Deadline(5, Target(train_loss=level)),)
        with pytest.raises(InterruptedError):
            train(plan, tmp_path / name, Blobs(fail_at=4 * 12), save_seconds=0, deadlines=deadlines)
        resumed = train(plan, tmp_path / name, save_seconds=0, deadlines=deadlines)
        assert resumed.progress.status == status and len(resumed.rows) == (12 if status == "done" else 5)


def test_a_trial_at_its_end_is_whole(tmp_path: Path) -> None:
    steps = train(baseline(), tmp_path / "alone").progress.steps
    late = train(baseline(), tmp_path, deadlines=(Deadline(steps, NEVER),), evaluate=Interval(epochs=1))
    assert late.progress.status == "done"


def test_two_workers_give_up_together_also_after_a_resume(tmp_path: Path) -> None:
    """Rank 0 alone has the rows of before: both must know which deadlines they have met."""
    pair = Pair(tmp_path / "rendezvous")
    try:
        alone = train(baseline(), tmp_path / "alone").rows
        met, missed = Deadline(2, Target(train_loss=alone[0]["train_loss"])), Deadline(6, NEVER)
        pruned = pair.train(baseline(), tmp_path / "pair", deadlines=(met, missed), save_seconds=0)
        assert (pruned.progress.status, pruned.progress.steps) == ("pruned", 6)
        resumed = pair.train(baseline(), tmp_path / "pair", deadlines=(met,), save_seconds=0)
        assert resumed.progress.status == "done"
        assert [r["train_loss"] for r in resumed.rows] == pytest.approx([r["train_loss"] for r in alone], rel=1e-12)
    finally:
        pair.close()
