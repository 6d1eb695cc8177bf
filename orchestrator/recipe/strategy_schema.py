"""What a recipe may say of strategies: one of the catalogue, with the options of its dataclass."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from orchestrator.recipe.choices import Choice
from orchestrator.recipe.derive import choice_of
from strategies import CATALOGUE

if TYPE_CHECKING:
    StrategyChoice: TypeAlias = Choice
else:
    StrategyChoice = choice_of(CATALOGUE)
