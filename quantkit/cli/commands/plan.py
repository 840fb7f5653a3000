"""`quantkit plan`: what a build would do."""

from __future__ import annotations

import click

from quantkit.cli.console import as_json_list, handle_errors, show
from quantkit.cli.options import JSON, SET, read_recipe


@click.command()
@click.argument("recipe")
@SET
@JSON
@handle_errors
def COMMAND(recipe: str, overrides: tuple[str, ...], json_out: bool) -> None:
    """Show what a build would do, from headers or the published config alone.

    RECIPE is a file or the name of one that ships with quantkit.

    Example: quantkit plan v3-awq4
    """
    from quantkit.plan.sources import bound_text_tokens, plan_recipe, resolve_source_facts
    from quantkit.plan.summary import summarize_plan
    from quantkit.report.terminal import render_plans

    _, parsed = read_recipe(recipe, overrides)
    found = [
        summarize_plan(made)
        for made in plan_recipe(parsed, resolve_source_facts(parsed), bound_text_tokens(parsed))
    ]
    if json_out:
        as_json_list([summary.model_dump(mode="json") for summary in found])
    else:
        show(render_plans(found))
