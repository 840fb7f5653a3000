"""`quantkit runs`: the artifacts of a folder."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import as_json, handle_errors, show
from quantkit.cli.options import JSON


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--sort",
    "column",
    default="size",
    help="size (default), kl, ppl, top1, bits, name, ... or a benchmark.",
)
@click.option("--reverse", is_flag=True, help="The worst first.")
@JSON
@handle_errors
def COMMAND(folder: Path, column: str, reverse: bool, json_out: bool) -> None:
    """List the artifacts in FOLDER with their key figures, and mark those that none beats in size and KL.

    The best comes first: the smallest size, bits, KL and perplexity ratio, the largest top-1 and score. What is broken
    is listed with the reason.

    Example: quantkit runs artifacts --sort kl
    """
    from quantkit.report import runs, terminal

    found = runs.sort_runs(runs.read_runs(folder), column, reverse=reverse)
    if json_out:
        as_json([run.values() for run in found])
        return
    made = [
        made
        for made in (
            runs.make_run_table(found),
            runs.make_score_table(found),
            runs.make_fault_table(found),
        )
        if made.rows
    ]
    show(*(terminal.render_table(table) for table in made))
    if not made:
        click.echo(f"{folder}: no artifact in it")
