"""Where a search looks: designs, scales, Optuna's proposals, and what a recipe may ask for."""

from __future__ import annotations

import math
import statistics
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import qmc

from orchestrator.recipe import Recipe, RecipeError, dump, expand, resolved
from orchestrator.recipe.load import loads
from orchestrator.recipe.resolve import size
from orchestrator.recipe.search_schema import Axis
from orchestrator.search import space
from orchestrator.search.designs import design
from orchestrator.search.optuna_sampler import propose
from orchestrator.search.stages import Stages

RECIPE = """\
study: s
workload: {data: digits, target: {test_accuracy: 0.9}}
base: {batch: 32, epochs: 2}
grid: {base.batch: [32, 64, 512]}
search:
  space: {base.rate.peak: {log_uniform: [0.01, 10]}, base.optimizer.sgd.momentum: {one_minus_log: [0.9, 0.99]}}
  points: 6
"""
AXES: list[dict[str, Any]] = [
    {"uniform": [-1.0, 3.0]},
    {"log_uniform": [1e-3, 10.0]},
    {"one_minus_log": [0.0, 0.999]},
    {"exponential": 1e-4},
]


def recipe(*overrides: str, text: str = RECIPE) -> Recipe:
    return loads(text, "recipe.yaml", overrides)


def problem(*overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        recipe(*overrides)
    return str(error.value)


# -------------------------------------------------------------------------------------------------------------- designs


@pytest.mark.parametrize("method", ["sobol", "halton", "griswold"])
def test_every_batch_size_gets_the_same_points(method: str) -> None:
    trials = expand(recipe(f"search.method={method}"), "data", "fp32")
    found: dict[int, list[tuple[float, float]]] = {}
    for t in trials:
        assert t.role == "tuning" and t.base.optimizer.sgd
        assert t.point == {
            "base.batch": t.base.batch,
            "base.rate.peak": t.base.rate.peak,
            "base.optimizer.sgd.momentum": t.base.optimizer.sgd.momentum,
        }
        found.setdefault(t.base.batch, []).append((t.base.rate.peak, t.base.optimizer.sgd.momentum))
    assert found[32] == found[64] == found[512] and len(set(found[32])) == 6
    assert len({t.id for t in trials}) == 18 and size(recipe()) == 3 * (6 + 5)


@pytest.mark.parametrize("method", ["sobol", "halton", "griswold"])
def test_the_first_points_stay_when_more_are_asked_for(method: str) -> None:
    longest = design(method, 33, 3, 7)
    for n in (1, 2, 5, 8, 17):
        assert design(method, n, 3, 7) == longest[:n]
    assert design(method, 5, 3, 8) != longest[:5]
    assert (
        expand(recipe(f"search.method={method}", "search.points=3"), "d", "fp32")[:3]
        == (expand(recipe(f"search.method={method}"), "d", "fp32")[:3])
    )


@pytest.mark.parametrize("method", ["sobol", "halton"])
@pytest.mark.parametrize("n", [20, 64])
def test_quasi_random_points_leave_smaller_gaps_than_random_ones(method: str, n: int) -> None:
    random = statistics.median(qmc.discrepancy(np.random.default_rng(i).random((n, 3))) for i in range(20))
    for seed in range(5):
        assert qmc.discrepancy(np.array(design(method, n, 3, seed))) < 0.5 * random


def test_designs_are_those_of_scipy() -> None:
    sobol = qmc.Sobol(4, rng=np.random.default_rng(3)).random(16)
    halton = qmc.Halton(4, rng=np.random.default_rng(3)).random(16)
    assert design("sobol", 16, 4, 3) == tuple(map(tuple, sobol.tolist()))
    assert design("halton", 16, 4, 3) == tuple(map(tuple, halton.tolist()))


def test_griswold_begins_at_the_start_and_goes_on_in_powers_of_ten() -> None:
    axis = Axis.model_validate({"exponential": 1e-4})
    points = design("griswold", 3000, 2, 0)
    assert [space.value(axis, u) for u in points[0]] == [1e-4, 1e-4]
    powers = np.array([[math.log10(space.value(axis, u) / 1e-4) for u in point] for point in points[1:]])
    for column in powers.T:
        assert stats.kstest(column, "norm").pvalue > 0.01
    assert abs(np.corrcoef(powers.T)[0, 1]) < 0.05


# --------------------------------------------------------------------------------------------------------------- scales


def test_ends_and_middles_of_the_scales() -> None:
    def at(axis: dict[str, Any]) -> list[float]:
        return [space.value(Axis.model_validate(axis), u) for u in (0.0, 0.5, 1.0)]

    assert at({"uniform": [-1.0, 3.0]}) == [-1, 1, 3]
    assert at({"log_uniform": [0.01, 100.0]}) == [0.01, 1, 100]
    assert at({"one_minus_log": [0.9, 0.999]}) == [0.9, 0.99, 0.999]


@given(axis=st.sampled_from(AXES), u=st.floats(0, 1))
def test_positions_are_the_inverse_of_values(axis: dict[str, Any], u: float) -> None:
    made = Axis.model_validate(axis)
    value = space.value(made, u)
    assert space.value(made, space.position(made, value)) == pytest.approx(value, rel=2e-4, abs=1e-3)
    if made.name != "exponential":
        low, high = made.options
        assert low <= value <= high
        assert space.position(made, value) == pytest.approx(u, abs=2e-3)


def test_edges_are_five_percent_of_the_box_on_its_own_scale() -> None:
    search = recipe("search.points=64").search
    assert search

    def edges(peak: float, momentum: float) -> list[str]:
        return space.edges(search, {"base.rate.peak": peak, "base.optimizer.sgd.momentum": momentum})

    inside = 10 ** (-2 + 3 * 0.06)
    assert edges(inside, 0.95) == []
    assert edges(10 ** (-2 + 3 * 0.04), 0.95) == ["base.rate.peak 0.0131826 at the lower edge of [0.01, 10]"]
    assert [e.split(" at ")[1] for e in edges(9.9, 0.989)] == [
        "the upper edge of [0.9, 0.99]",
        "the upper edge of [0.01, 10]",
    ]
    free = recipe("search.space={base.rate.peak: {exponential: 0.1}}").search
    assert free and space.edges(free, {"base.rate.peak": 1e9}) == []


@pytest.mark.parametrize("points", [4, 7, 8, 16, 20])
@pytest.mark.parametrize("method", ["sobol", "halton"])
def test_the_outermost_points_of_a_design_are_edges(method: str, points: int) -> None:
    """Few points leave a gap at the ends that is wider than 5 % of the box."""
    search = recipe(f"search.method={method}", f"search.points={points}").search
    assert search
    for path, axis in space.axes(search).items():
        tried = sorted(space.designed(search), key=lambda point: point[path])
        told = [space.side("; ".join(space.edges(search, point)), path) for point in tried]
        assert (told[0], told[-1]) == ("lower", "upper")
        far = [0.05 <= space.position(axis, point[path]) <= 0.95 for point in tried]
        assert not any(side for side, inside in zip(told[1:-1], far[1:-1], strict=True) if inside)


def test_a_single_point_is_at_no_edge() -> None:
    search = recipe("search.points=1").search
    assert search and space.edges(search, space.place(search, (0.3, 0.6))) == []


# --------------------------------------------------------------------------------------------------------------- optuna


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_proposals_depend_on_the_history_alone_and_close_in(sampler: str) -> None:
    def run(n: int) -> list[tuple[float, ...]]:
        history: tuple[Any, ...] = ()
        for _ in range(n):
            unit = propose(sampler, 0, 1, history)
            history = (*history, (unit, (abs(unit[0] - 0.3), 0.0)))
        return [unit for unit, _ in history]

    first = run(25)
    propose.cache_clear()
    assert run(25) == first
    late = statistics.median(abs(u - 0.3) for (u,) in first[15:])
    assert late < 0.15  # uniform points: 0.25; a study of Optuna's own: 0.11 by TPE


# -------------------------------------------------------------------------------------------------------------- recipes


def test_an_arm_may_be_searched_in_its_own_way() -> None:
    arms = (
        "arms={a: {}, b: {base: {optimizer: adamw}, search: {space: {base.rate.peak: {log_uniform: [0.01, 10]},"
        " base.optimizer.adamw.beta1: {one_minus_log: [0.5, 0.99]}}, points: 6, winners: 1}}}"
    )
    trials = expand(recipe(arms), "data", "fp32")
    assert {t.base.optimizer.name for t in trials if t.arm == "b"} == {"adamw"} and len(trials) == 36
    assert size(recipe(arms)) == 3 * (6 + 5) + 3 * (6 + 1)


METHODS = (
    "strategies=[{label_smoothing: {amount: 0.1}}]",
    "arms={a: {strategies: [{mixup: {alpha: 0.3}}, ema]}}",
    "search.space={strategies.mixup.alpha: {uniform: [0.1, 0.9]}, strategies.label_smoothing.amount: {uniform: [0, 0.3]}}",
)


def test_options_of_strategies_are_searched() -> None:
    """Those of the study and of the arm; what is not searched stays as the recipe has it."""
    trials = expand(recipe(*METHODS), "data", "fp32")
    for t in trials:
        assert [name for name, _ in t.strategies] == ["label_smoothing", "mixup", "ema"]
        smoothing, mixup, ema = (options for _, options in t.strategies)
        assert smoothing == {"amount": t.point["strategies.label_smoothing.amount"]}
        assert mixup["alpha"] == t.point["strategies.mixup.alpha"]
        assert ema == recipe(*METHODS).arms["a"].strategies[1].options.model_dump()
    assert len({t.id for t in trials}) == 18 and min(t.strategies[1][1]["alpha"] for t in trials) >= 0.1


def test_the_winner_has_the_options_that_won() -> None:
    results: dict[str, Any] = {}
    stages = Stages(recipe(*METHODS, "search.winners=2"), lambda data: "data", "fp32", results.get)
    for t in stages.trials:
        target = {"reached": True, "step": round(1000 * abs(t.strategies[1][1]["alpha"] - 0.6))}
        results[t.id] = {"status": "done", "target": target, "final": {"test_accuracy": 0.9}, "point": t.point}
    best = min(stages.trials, key=lambda t: results[t.id]["target"]["step"])
    assert stages.update()
    winners = [t for t in stages.trials if t.role == "winner"]
    assert len(winners) == 6 and {t.seed for t in winners} == {1, 2}
    assert all(t.strategies == best.strategies for t in winners)


def test_an_arm_without_the_strategy_may_be_searched_in_its_own_way() -> None:
    arms = (
        "arms={plain: {}, smooth: {strategies: [label_smoothing], search: {points: 6, space: {base.rate.peak: {log_uniform: "
        "[0.01, 10]}, strategies.label_smoothing.amount: {uniform: [0, 0.3]}}}}}"
    )
    trials = expand(recipe(arms), "data", "fp32")
    assert {len(t.strategies) for t in trials if t.arm == "plain"} == {0} and len(trials) == 36


def test_a_resolved_recipe_reads_back_the_same() -> None:
    first = recipe("search.method={optuna: {sampler: gp}}", "search.prune=exact")
    again = loads(dump(resolved(first)), "resolved.yaml")
    assert resolved(again) == resolved(first) and again.search == first.search


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("search.space={}", "search.space: expected at least one path"),
        ("search.space={base.rate.peek: {uniform: [0, 1]}}", 'did you mean "base.rate.peak"?'),
        ("search.space={base.batch: {uniform: [0, 1]}}", "base.batch: unknown key"),
        ("search.space={base.rate.peak: {log_uniform: [0, 1]}}", "log_uniform[0]: expected > 0, got 0"),
        ("search.space={base.rate.peak: {uniform: [1, 2, 3]}}", "uniform: expected at most 2 entries, got 3"),
        ("search.space={base.rate.peak: {uniform: [1]}}", "uniform: expected at least 2 entries, got 1"),
        ("search.space={base.rate.peak: {uniform: [2, 1]}}", "expected [low, high], got [2, 1]"),
        ("search.space={base.rate.peak: {uniform: [-2, -1]}}", "search.space.base.rate.peak: expected > 0, got -"),
        ("search.space={base.optimizer.sgd.momentum: {exponential: 0.9}}", "momentum: expected < 1, got "),
        (
            "search.space={base.optimizer.adamw.beta1: {uniform: [0, 0.9]}}",
            "arm base has base.optimizer sgd, not adamw",
        ),
        (
            "search.space={strategies.mixup.alpha: {uniform: [0, 1]}}",
            "search.space.strategies.mixup.alpha: arm base has no mixup: give the arms that have it a search of their own",
        ),
        ("search.space={strategies.mixup.alfa: {uniform: [0, 1]}}", 'did you mean "strategies.mixup.alpha"?'),
        ("search.space={strategies.ghost_batch_norm.size: {uniform: [0, 1]}}", "size: unknown key"),  # no real number
        ("search.points=0", "search.points: expected >= 1, got 0"),
        ("search.points=9999", "search: makes 30012 trials, expected at most 10000"),
        ("search.method=sobel", 'text "sobel" is not known, did you mean "sobol"?'),
        ("search.winners=0", "search.winners: expected >= 1, got 0"),
        ("grid.base.rate.peak=[1]", "overlaps with base.rate.peak of the grid"),
    ],
)
def test_what_is_wrong_is_told(change: str, said: str) -> None:
    assert said in problem(change)


def test_options_of_strategies_keep_their_limits() -> None:
    methods = [*METHODS[:2], "search.space={strategies.mixup.alpha: {uniform: [-2, -1]}}"]
    assert "search.space.strategies.mixup.alpha: expected >= 0, got -1." in problem(*methods)
    twice = [METHODS[0], "arms={a: {strategies: [{label_smoothing: {amount: 0.2}}]}}"]
    assert "arm a has label_smoothing 2 times, expected once" in problem(
        *twice, "search.space={strategies.label_smoothing.amount: {uniform: [0, 0.5]}}"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["search.prune=exact", "seeds=2"], "search.prune: exact compares single trials, expected one seed"),
        (["search.prune=exact", "workload.target=null"], "exact goes by steps to the target"),
        (["search.prune=asha", "base.rate.decay=cosine"], "asha ranks trials before their rates have decayed"),
        (["search.prune=median", "base.rate.decay=linear"], "accept_bias: true"),
        (["search.prune=median", "base.rate.warmup=1.5"], "expected grace >= 1.5 epochs, got 1"),
        (["search.prune=asha", "search.space={base.epochs: {uniform: [1, 2]}}"], "compares trials of one length"),
        (["search.prune=asha", "search.space={base.rate.warmup: {uniform: [0, 1.2]}}"], "expected grace >= 1.2"),
        (
            ["arms={a: {}, b: {search: {space: {base.rate.peak: {log_uniform: [0.01, 10]}}, points: 7}}}"],
            "has 7 points",
        ),
        (
            ["arms={a: {}, b: {search: {space: {base.rate.peak: {log_uniform: [0.01, 1]}}, points: 6}}}"],
            "arms.b.search: has another box for base.rate.peak than arm a",
        ),
    ],
)
def test_caveats_are_enforced(changes: list[str], said: str) -> None:
    assert said in problem(*changes)


@pytest.mark.parametrize("order", list(permutations("abc")))
def test_all_arms_are_searched_alike_and_not_neighbours_only(order: tuple[str, ...]) -> None:
    spaces = {
        "a": "base.rate.peak: {log_uniform: [0.01, 0.1]}",
        "b": "base.optimizer.sgd.momentum: {uniform: [0.1, 0.9]}",
        "c": "base.rate.peak: {log_uniform: [1.0e-4, 10]}",
    }
    arms = ", ".join(f"{name}: {{search: {{points: 6, space: {{{spaces[name]}}}}}}}" for name in order)
    first, second = (name for name in order if name != "b")
    said = problem(f"arms={{{arms}}}", "search=null")
    assert f"arms.{second}.search: has another box for base.rate.peak than arm {first}" in said


def test_each_arm_is_told_once_that_it_is_searched_otherwise() -> None:
    arms = ", ".join(f"{name}: {{search: {{points: {n}, space: {{base.rate.peak: {{uniform: [1, 2]}}}}}}}}"
                     for n, name in enumerate("abc", start=3))  # fmt: skip
    said = problem(f"arms={{{arms}}}", "search=null").splitlines()
    assert len(said) == 2 and "than arm a" in said[0] and "than arm a" in said[1]


def test_caveats_can_be_accepted() -> None:
    recipe("search.prune={asha: {accept_bias: true}}", "base.rate.decay=cosine")
    recipe("search.prune=median")
    recipe("arms={a: {}, b: {search: {space: {base.rate.peak: {uniform: [1, 2]}}, points: 2, allow_unequal: true}}}")
