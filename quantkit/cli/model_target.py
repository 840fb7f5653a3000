"""Options that choose the recipe of a model, and how the choice is shown and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from quantkit.cli.console import escape_controls
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.plan.choose_recipe import ChosenRecipe
    from quantkit.plan.recipe_draft import RecipeRequest
    from quantkit.recipe.schema import Recipe

CHOSEN_FILE = "recipe.yaml"
"""The file that `build MODEL` writes its recipe to."""

Command = TypeVar("Command", bound=Callable[..., object])

_OPTIONS = (
    click.option("--method", metavar="NAME", help="For a model: awq (default), gptq, nf4, rtn."),
    click.option(
        "--scheme",
        metavar="NAME",
        help="For a model: int (default), or FP4 as nvfp4 or mxfp4.",
    ),
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


def add_model_options(command: Command) -> Command:
    """Add --method, --scheme, --bits, --format and --rules to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def make_request(
    model: str,
    method: str | None,
    scheme: str | None,
    bits: int | None,
    format_name: str | None,
    rules: str | None,
    output: str | None,
) -> RecipeRequest:
    """Return the request of the values of `add_model_options` and --output."""
    from quantkit.plan.recipe_draft import RecipeRequest

    return RecipeRequest(
        model=model,
        method=method,
        scheme=scheme,
        bits=bits,
        format=format_name,
        rules=rules,
        output=output,
    )


def check_no_recipe_file(path: Path | None, recipe: str) -> None:
    """Raise UsageError for --recipe with a target that is a recipe itself."""
    if path is not None:
        raise UsageError(
            f"--recipe: expected a model with it, found the recipe {escape_controls(recipe)}; "
            "leave it out"
        )


def show_choices(chosen: ChosenRecipe) -> None:
    """Print the choices for a model, with the reasons."""
    from quantkit.cli.rich_output import show
    from quantkit.report.table import Table
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
