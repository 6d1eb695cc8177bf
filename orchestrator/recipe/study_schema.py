"""The whole recipe: one study, its arms, its grid, its seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from orchestrator.recipe.choices import Count, Model, Name, Positive
from orchestrator.recipe.derive import grid_over, patch_of
from orchestrator.recipe.schema import Base, Checkpoint, Cluster, Ddp, Engine, Precision, Speed, Tracking
from orchestrator.recipe.search_schema import Search
from orchestrator.recipe.strategy_schema import StrategyChoice
from orchestrator.recipe.workload_schema import Network, Workload

if TYPE_CHECKING:
    BasePatch: TypeAlias = Base
    Grid: TypeAlias = Model
else:
    BasePatch = patch_of(Base)
    # "auto" may be the same as another value, so it cannot be crossed with them
    Grid = grid_over(base=Base, workload=Workload, precision=Literal["fp32", "bf16", "fp64"])


def distinct(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "expected each value once")
    return values


Distinct = Annotated[
    list[Count], Field(min_length=1, json_schema_extra={"uniqueItems": True}), AfterValidator(distinct)
]


Reason = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"\S")]


class Arm(Model):
    """One combination that the study compares with others."""

    strategies: list[StrategyChoice] = Field(default=[], description="applied after the strategies of the study")
    base: BasePatch = Field(default=BasePatch.model_validate({}), description="what this arm changes in the base")
    model: Network | None = Field(default=None, description="this arm's network, instead of the workload's")
    search: Search | None = Field(default=None, description="this arm's, instead of the study's")


class Recipe(Model):
    """A bigbatch study: workload x arms x grid x seeds."""

    study: Name = Field(description="names the directory of the results")
    workload: Workload
    engine: Engine = Engine(ddp=Ddp())
    cluster: Cluster = Cluster()
    precision: Precision = Field(
        default="auto",
        description="auto: bf16 where there is a GPU for each worker, or convolutions were measured to gain by it on a "
        "CPU of the workers; else fp32. A study goes on with what it began with, on any machine",
    )
    speed: Speed = Speed()
    base: Base
    strategies: list[StrategyChoice] = Field(default=[], description="applied in every arm")
    arms: dict[Name, Arm] = Field(
        default={"base": Arm()}, min_length=1, json_schema_extra={"additionalProperties": False}
    )
    grid: Grid = Field(default=Grid(), description="values to cross, by dotted path: {base.batch: [32, 128]}")
    search: Search | None = Field(default=None, description="points to try in each arm and at each point of the grid")
    seeds: Positive | Distinct = Field(default=1, description="how many (3: seeds 0, 1, 2), or which")
    tracking: Tracking = Tracking()
    checkpoint: Checkpoint = Checkpoint()
    unfair: Reason | None = Field(
        default=None,
        description="why LARS or LAMB stand without equally tuned nesterov and adamw arms; the report tells it",
    )
    log_steps: Positive = Field(default=50, description="optimizer steps between rows of metrics.jsonl")
