"""`quantkit schema`: print a JSON Schema for editors."""

from __future__ import annotations

from typing import Literal

import click

from quantkit.cli.console import handle_errors


@click.command()
@click.option(
    "--of",
    "kind",
    type=click.Choice(["recipe", "set"]),
    default="recipe",
    show_default=True,
    help="A recipe, or the spec of a calibration or fidelity set.",
)
@handle_errors
def command(kind: Literal["recipe", "set"]) -> None:
    """Print the JSON Schema of a recipe.

    Editors with a YAML language server complete and check a recipe that starts with the line
    "# yaml-language-server: $schema=recipe.schema.json".

    \b
    Example: quantkit schema > recipe.schema.json
             quantkit schema --of set > set.schema.json
    """
    # `quantkit schema --help` starts without pydantic
    from quantkit.recipe.json_schema import format_schema, make_recipe_schema, make_set_schema

    schema = make_recipe_schema() if kind == "recipe" else make_set_schema()
    click.echo(format_schema(schema), nl=False)
