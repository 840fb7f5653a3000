"""From a model to a recipe: reads its headers, then `choose_recipe` decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.plan.choose_recipe import CHOSEN_NAME, ChosenRecipe, choose_recipe
from quantkit.plan.plan import match_source
from quantkit.plan.recipe_draft import RecipeRequest
from quantkit.plan.sources import read_model_facts
from quantkit.recipe.parse import parse_recipe, write_overrides
from quantkit.recipe.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The recipe of a model: its text with the overrides in it, and what was chosen."""

    text: str
    recipe: Recipe
    chosen: ChosenRecipe


def make_model_recipe(request: RecipeRequest, overrides: Mapping[str, str]) -> ModelRecipe:
    """Read the headers of a model and choose its recipe; write `overrides` into the text.

    Raises UsageError, RecipeError or CheckpointError.
    """
    source = read_model_facts(request.model)
    return finish_recipe(choose_recipe(request, source, match_source(source)), overrides)


def finish_recipe(chosen: ChosenRecipe, overrides: Mapping[str, str]) -> ModelRecipe:
    """Write `overrides` into the text of a chosen recipe; raises RecipeError for wrong ones."""
    parse_recipe(chosen.text, CHOSEN_NAME, overrides)  # faults name the overrides, not lines
    text = write_overrides(chosen.text, overrides)
    return ModelRecipe(text=text, recipe=parse_recipe(text, CHOSEN_NAME), chosen=chosen)
