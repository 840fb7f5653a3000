"""From a target, a recipe or a model, to a recipe. Reads headers; `choose_recipe` decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantkit.errors import UsageError
from quantkit.io.yaml_document import printable
from quantkit.plan.choose_recipe import CHOSEN_NAME, ChosenRecipe, choose_recipe, make_chosen
from quantkit.plan.explain_recipe import name_scheme
from quantkit.plan.plan import match_source
from quantkit.plan.recipe_draft import RecipeRequest
from quantkit.plan.sources import read_model_facts
from quantkit.recipe.parse import parse_recipe, write_overrides
from quantkit.recipe.recipe_file import is_model, read_recipe
from quantkit.recipe.schema import Recipe
from quantkit.recipe.write_recipe import Choice, Section

OVERRIDDEN = "set by an override"


@dataclass(frozen=True, kw_only=True)
class TargetRecipe:
    """The text and the recipe of a target; chosen: the choices for a model; None for a recipe.

    The text of a model's recipe has the overrides in it.
    """

    text: str
    recipe: Recipe
    chosen: ChosenRecipe | None = None


def read_target(request: RecipeRequest, overrides: Mapping[str, str]) -> TargetRecipe:
    """Return the recipe of `request.model`, which may also name a recipe.

    For a model, reads its headers and chooses. Raises UsageError, RecipeError or CheckpointError.
    """
    target = request.model
    if is_model(target):
        source = read_model_facts(target)
        chosen = choose_recipe(request, source, match_source(source))
        return finish_recipe(request, chosen, overrides)
    places = {"method": "quantize.", "bits": "quantize.", "format": "", "rules": ""}
    for key, section in places.items():
        if getattr(request, key) is not None:
            raise UsageError(
                f"{key}: expected a model (a folder, a hub id or builtin:NAME) with it, found the "
                f"recipe {printable(target)}; change the recipe, or override {section}{key}"
            )
    output = {} if request.output is None else {"output.path": request.output}
    text, recipe = read_recipe(target, {**overrides, **output})
    return TargetRecipe(text=text, recipe=recipe)


def finish_recipe(
    request: RecipeRequest, chosen: ChosenRecipe, overrides: Mapping[str, str]
) -> TargetRecipe:
    """Write `overrides` into the text of a chosen recipe; raises RecipeError for wrong ones."""
    final = parse_recipe(chosen.text, CHOSEN_NAME, overrides)  # faults name overrides, not lines
    if request.output is None:
        chosen = rename_output(chosen, final)
    chosen = mark_overrides(chosen, overrides)
    text = write_overrides(chosen.text, overrides)
    return TargetRecipe(text=text, recipe=parse_recipe(text, CHOSEN_NAME), chosen=chosen)


def rename_output(chosen: ChosenRecipe, final: Recipe) -> ChosenRecipe:
    """Return a chosen recipe whose folder has the method and bits of `final`, its recipe with
    overrides, in its name.
    """
    before, after = chosen.recipe.quantize, final.quantize
    if before is None or after is None:
        return chosen
    path = chosen.recipe.output.path.removesuffix(
        name_scheme(before.method, before.bits, before.scheme)
    )
    output = Choice(
        key="path", value=path + name_scheme(after.method, after.bits, after.scheme), is_text=True
    )
    sections = tuple(
        replace(x, choices=(output,)) if x.name == "output" else x for x in chosen.sections
    )
    return make_chosen(chosen.title, sections, chosen.engines, chosen.notes)


def mark_overrides(chosen: ChosenRecipe, overrides: Mapping[str, str]) -> ChosenRecipe:
    """Return a chosen recipe in which the reason of an overridden value is the override.

    The text keeps the chosen values, which `write_overrides` replaces; the choices have the new
    ones. Choices in a section that is overridden as a whole are left out.
    """

    def mark(section: Section, *, with_value: bool) -> Section:
        choices = []
        for choice in section.choices:
            value = overrides.get(f"{section.name}.{choice.key}".lstrip("."))
            if value is not None:
                shown = value if with_value else choice.value
                choice = replace(choice, value=shown, reason=OVERRIDDEN)
            choices.append(choice)
        return replace(section, choices=tuple(choices))

    written = tuple(mark(section, with_value=False) for section in chosen.sections)
    shown = tuple(
        mark(section, with_value=True)
        for section in chosen.sections
        if section.name not in overrides
    )
    text = make_chosen(chosen.title, written, chosen.engines, chosen.notes)
    return replace(text, sections=shown)
