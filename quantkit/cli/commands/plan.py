"""`quantkit plan`: show the plan of a build."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import handle_errors, print_json_list
from quantkit.cli.model_target import (
    add_model_options,
    check_no_recipe_file,
    make_request,
    save_chosen,
    show_choices,
)
from quantkit.cli.options import JSON, SET, parse_overrides
from quantkit.cli.rich_output import show
from quantkit.plan.summary import summarize_plan
from quantkit.report.terminal_plan import render_plans


@click.command()
@click.argument("target", metavar="RECIPE|MODEL")
@add_model_options
@SET
@click.option("--output", metavar="DIR", help="Folder of the artifact, in place of output.path.")
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="For a model: write its recipe to this file.",
)
@JSON
@handle_errors
def command(
    target: str,
    method: str | None,
    scheme: str | None,
    bits: int | None,
    format_name: str | None,
    rules: str | None,
    overrides: tuple[str, ...],
    output: str | None,
    recipe_file: Path | None,
    json_out: bool,
) -> None:
    """Show what a build would do.

    RECIPE is a file or the name of a recipe that ships with quantkit. MODEL is a folder, a hub id
    (owner/name) or builtin:tiny-v3: a recipe is chosen for it and printed with the reasons, as
    `quantkit build MODEL` does. Of the source only headers or the published config are read, and
    tied weights that are stored twice; texts on this machine are tokenized. The time is scaled from
    complete builds that were measured on this machine. Nothing is written without --recipe.

    \b
    Example: quantkit plan v3-awq4
             quantkit plan ./my-model --bits 8
    """
    # Reading headers needs torch's dtypes: `quantkit plan --help` starts without.
    from quantkit.evaluate.check_plan import plan_and_check
    from quantkit.plan.model_recipe import read_target
    from quantkit.plan.sources import describe_sampled_texts, resolve_source_facts
    from quantkit.plan.time_estimate import estimate_plan

    request = make_request(target, method, scheme, bits, format_name, rules, output)
    read = read_target(request, parse_overrides(overrides))
    if read.chosen is None:
        check_no_recipe_file(recipe_file, target)
    else:
        if not json_out:
            show_choices(read.chosen)
        if recipe_file is not None:
            save_chosen(read.text, read.recipe, recipe_file)
    parsed = read.recipe
    plans = plan_and_check(parsed, resolve_source_facts(parsed))
    sampled = describe_sampled_texts(plans[0].recipe)
    summaries = [summarize_plan(plan, sampled, estimate_plan(plan)) for plan in plans]
    if json_out:
        print_json_list([summary.model_dump(mode="json") for summary in summaries])
    else:
        show(render_plans(summaries))
