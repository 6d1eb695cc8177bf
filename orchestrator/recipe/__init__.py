"""Recipes: what a study asks, read from YAML, checked to the last key, expanded into trials."""

from orchestrator.recipe.json_schema import json_schema
from orchestrator.recipe.load import cautions, load
from orchestrator.recipe.problems import Problem, RecipeError
from orchestrator.recipe.resolve import dump, expand, resolved
from orchestrator.recipe.study_schema import Recipe

__all__ = ["Problem", "Recipe", "RecipeError", "cautions", "dump", "expand", "json_schema", "load", "resolved"]
