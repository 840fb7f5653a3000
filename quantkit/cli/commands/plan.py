"""`quantkit plan`: show the plan of a build."""

from __future__ import annotations

import click

from quantkit.cli.console import handle_errors, print_json_list
from quantkit.cli.options import JSON, SET, parse_overrides
from quantkit.cli.rich_output import show
from quantkit.plan.summary import summarize_plan
from quantkit.recipe.recipe_file import read_recipe
from quantkit.report.terminal import render_plans


@click.command()
@click.argument("recipe")
@SET
@JSON
@handle_errors
def command(recipe: str, overrides: tuple[str, ...], json_out: bool) -> None:
    """Show what a build would do.

    RECIPE is a file or the name of a recipe that ships with quantkit. Only headers or the published
    config of the source are read: no weights.

    Example: quantkit plan v3-awq4
    """
    # Reading headers needs torch's dtypes: `quantkit plan --help` starts without.
    from quantkit.plan.sources import describe_sampled_texts, plan_recipe, resolve_source_facts

    _, parsed = read_recipe(recipe, parse_overrides(overrides))
    plans = plan_recipe(parsed, resolve_source_facts(parsed))
    sampled = describe_sampled_texts(plans[0].recipe)
    summaries = [summarize_plan(plan, sampled) for plan in plans]
    if json_out:
        print_json_list([summary.model_dump(mode="json") for summary in summaries])
    else:
        show(render_plans(summaries))
