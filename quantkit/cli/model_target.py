"""The target of `build` and `plan`: a recipe, or a model whose recipe is chosen and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from quantkit.cli.console import escape_controls
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.plan.choose_recipe import ChosenRecipe
    from quantkit.recipe.schema import Recipe

CHOSEN_FILE = "recipe.yaml"
"""The file that `build MODEL` writes its recipe to."""

Command = TypeVar("Command", bound=Callable[..., object])

_OPTIONS = (
    click.option("--method", metavar="NAME", help="For a model: awq (default), gptq, nf4, rtn."),
    click.option(
        "--bits", type=click.IntRange(2, 8), help="For a model: bits of a weight.  [default: 4]"
    ),
    click.option(
        "--format", "format_name", metavar="NAME", help="For a model: how codes are stored."
    ),
    click.option(
        "--rules",
        metavar="PRESET",
        help="For a model: experts-only, all-linear or attention-source.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The options that choose the recipe of a model; None: not given."""

    method: str | None
    bits: int | None
    format_name: str | None
    rules: str | None
    recipe_file: Path | None = None

    def list_given(self) -> list[str]:
        """Return the names of the options that were given."""
        values = {
            "--method": self.method,
            "--bits": self.bits,
            "--format": self.format_name,
            "--rules": self.rules,
            "--recipe": self.recipe_file,
        }
        return [name for name, value in values.items() if value is not None]


def add_model_options(command: Command) -> Command:
    """Add --method, --bits, --format and --rules to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_target(
    target: str, overrides: Mapping[str, str], options: ModelOptions, output: str | None = None
) -> tuple[str, Recipe, ChosenRecipe | None]:
    """Return the text and the recipe of a target, and what was chosen if it is a model.

    Raises UsageError for options of models with a recipe.
    """
    from quantkit.recipe.recipe_file import is_model, read_recipe

    if not is_model(target):
        if given := options.list_given():
            raise UsageError(
                f"{given[0]}: expected a model (a folder, a hub id or builtin:NAME) with it, found "
                f"the recipe {escape_controls(target)}; change the recipe, or use --set KEY=VALUE"
            )
        values = dict(overrides) | ({} if output is None else {"output.path": output})
        return *read_recipe(target, values), None
    # `--help` and recipes start without torch
    from quantkit.plan.model_recipe import make_model_recipe
    from quantkit.plan.recipe_draft import RecipeRequest

    request = RecipeRequest(
        model=target,
        method=options.method,
        bits=options.bits,
        format=options.format_name,
        rules=options.rules,
        output=output,
    )
    made = make_model_recipe(request, overrides)
    return made.text, made.recipe, made.chosen


def show_choices(chosen: ChosenRecipe) -> None:
    """Print what was chosen for a model, with the reasons."""
    from quantkit.cli.rich_output import show
    from quantkit.report.tables import Table
    from quantkit.report.terminal import render_table

    show(
        render_table(
            Table(
                title="Chosen for this model",
                columns=("key", "value", "reason"),
                rows=chosen.choices,
                note="",
            )
        )
    )


def save_chosen(text: str, recipe: Recipe, path: Path) -> None:
    """Write the recipe of a model to a file, unless it has it already; report it on stderr."""
    from quantkit.recipe.recipe_file import save_recipe

    is_new = save_recipe(path, text, recipe)
    click.echo(f"recipe: {path} ({'written' if is_new else 'unchanged'})", err=True)
