"""`quantkit runs`: list the artifacts of a folder."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import handle_errors, print_json
from quantkit.cli.options import JSON, check_page_options
from quantkit.cli.rich_output import show
from quantkit.errors import UsageError
from quantkit.io.files import write_output
from quantkit.report import runs, runs_page, terminal


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--sort",
    "column",
    default="size",
    help="size (default), kl, ppl, top1, bits, name, ... or a benchmark.",
)
@click.option("--reverse", is_flag=True, help="List the worst first.")
@click.option("--html", "html_out", is_flag=True, help="Write one HTML page.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Write the page to this file instead of the standard output.",
)
@JSON
@handle_errors
def command(
    folder: Path,
    column: str,
    reverse: bool,
    html_out: bool,
    output: Path | None,
    json_out: bool,
) -> None:
    """List the artifacts in FOLDER with their key figures.

    Artifacts that no other beats in both size and KL are marked. The best comes first: smallest
    size, bits, KL and perplexity ratio, largest top-1 and score. Broken artifacts are listed with
    the reason. With --html, a page shows KL against size, engines, and figures with intervals.

    Example: quantkit runs artifacts --html --output runs.html
    """
    check_page_options(html=html_out, output=output)
    if html_out and json_out:
        raise UsageError("--html, --json: expected one of them at most")
    if output and not html_out:
        raise UsageError(
            "--output: expected --html with it; tables and JSON go to the standard output"
        )
    artifacts = runs.sort_runs(runs.read_runs(folder), column, reverse=reverse)
    if html_out:
        page = runs_page.render_page(artifacts, str(folder))
        if output:
            write_output(output, page.encode())
        click.echo(output or page, nl=output is not None)
        return
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
