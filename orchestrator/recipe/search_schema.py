"""What a recipe may say of a search: the box, how points are laid into it, when trials are given up, who is run again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from orchestrator.recipe.choices import WHOLE, Choice, Count, Empty, Model, Positive
from orchestrator.recipe.derive import space_over
from orchestrator.recipe.schema import Base
from orchestrator.recipe.strategy_schema import StrategyChoice

TWO: Any = {"min_length": 2, "max_length": 2}
Factor = Annotated[int, Field(ge=2, le=100), WHOLE]


class Axis(Choice):
    """How one value is searched. Boxes are [low, high]."""

    uniform: Annotated[list[float], Field(**TWO)] | None = None
    log_uniform: Annotated[list[Annotated[float, Field(gt=0)]], Field(**TWO)] | None = Field(
        default=None, description="uniform in its logarithm"
    )
    one_minus_log: Annotated[list[Annotated[float, Field(lt=1)]], Field(**TWO)] | None = Field(
        default=None, description="uniform in log(1 - value), for momentum"
    )
    exponential: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="this start times 10^N(0,1): no box, so no edge either"
    )


class Optuna(Model):
    sampler: Literal["tpe", "gp"] = Field(default="tpe", description="tree-structured Parzen, or Gaussian process")


class Method(Choice):
    sobol: Empty | None = Field(default=None, description="scrambled Sobol points")
    halton: Empty | None = Field(default=None, description="scrambled Halton points")
    griswold: Empty | None = Field(default=None, description="independent points, the first at the centre of the space")
    optuna: Optuna | None = Field(
        default=None, description="each point from the results before it; a cell's points run one after the other"
    )


class Heuristic(Model):
    grace: Annotated[float, Field(ge=0)] = Field(default=1.0, description="epochs before which no trial is given up")
    accept_bias: bool = Field(
        default=False, description="needed where the rate decays: ranks before the end of the decay may then mislead"
    )


class Asha(Heuristic):
    grace: Annotated[float, Field(gt=0)] = Field(default=1.0, description="epochs to the first rung")
    factor: Factor = Field(default=4, description="a rung is this many times the one before, and 1 of so many goes on")


class Median(Heuristic):
    startup: Positive = Field(default=5, description="finished trials of the cell before any is given up")


class Prune(Choice):
    """When a trial of the search is given up. A trial is compared only with others of its arm and batch size."""

    none: Empty | None = None
    exact: Empty | None = Field(
        default=None, description="once it has taken more steps than the cell's best: the result is the same without it"
    )
    asha: Asha | None = Field(default=None, description="at rungs, by the metric so far: a heuristic")
    median: Median | None = Field(default=None, description="at each evaluation, if below the median: a heuristic")


if TYPE_CHECKING:
    Space: TypeAlias = Model
else:
    Space = space_over(Axis, base=Base, strategies=StrategyChoice)


class Search(Model):
    """A search of its own in each cell: each arm at each point of the grid."""

    space: Space = Field(
        description="by dotted path: {base.rate.peak: {log_uniform: [0.01, 10]}, strategies.lars.trust: ...}"
    )
    points: Annotated[int, Field(ge=1, le=10_000), WHOLE] = Field(
        default=20, description="tried in each cell, the same ones at every batch size"
    )
    method: Method = Method(sobol=Empty())
    seed: Count = Field(default=0, description="of the points; not of the training")
    winners: Annotated[int, Field(ge=1, le=1000), WHOLE] = Field(
        default=5, description="fresh seeds with which each cell's best point is run again, for the report"
    )
    prune: Prune = Prune(none=Empty())
    allow_unequal: bool = Field(default=False, description="let arms have different budgets or boxes")
