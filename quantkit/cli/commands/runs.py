"""`quantkit runs`: list the artifacts of a folder."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import handle_errors, print_json
from quantkit.cli.options import JSON
from quantkit.cli.rich_output import show
from quantkit.report import runs, terminal


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--sort",
    "column",
    default="size",
    help="size (default), kl, ppl, top1, bits, name, ... or a benchmark.",
)
@click.option("--reverse", is_flag=True, help="List the worst first.")
@JSON
@handle_errors
def command(folder: Path, column: str, reverse: bool, json_out: bool) -> None:
    """List the artifacts in FOLDER with their key figures.

    Artifacts that no other beats in both size and KL are marked. The best comes first: smallest
    size, bits, KL and perplexity ratio, largest top-1 and score. Broken artifacts are listed with
    the reason.

    Example: quantkit runs artifacts --sort kl
    """
    artifacts = runs.sort_runs(runs.read_runs(folder), column, reverse=reverse)
    if json_out:
        print_json([run.values() for run in artifacts])
        return
    tables = [
        table
        for table in (
            runs.make_run_table(artifacts),
            runs.make_score_table(artifacts),
            runs.make_fault_table(artifacts),
        )
        if table.rows
    ]
    show(*(terminal.render_table(table) for table in tables))
    if not tables:
        click.echo(f"{folder}: no artifact in it")
