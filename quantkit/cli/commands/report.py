"""`quantkit report`: print the fidelity report of an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.artifact.read_report import read_artifact_report
from quantkit.cli.console import handle_errors, print_json
from quantkit.cli.log_to import LOG_TO
from quantkit.cli.options import JSON
from quantkit.cli.rich_output import show
from quantkit.errors import UsageError
from quantkit.report.html_page import rebuild_page
from quantkit.report.terminal import render_results
from quantkit.tracking.log_run import log_artifact


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--full", is_flag=True, help="Print every table, not six lines.")
@click.option(
    "--html",
    "html_out",
    is_flag=True,
    help="Write the HTML page quantkit/fidelity.html again.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Write the page to this file, not into the artifact.",
)
@LOG_TO
@JSON
@handle_errors
def command(
    artifact: Path,
    full: bool,
    html_out: bool,
    output: Path | None,
    tracker: str | None,
    json_out: bool,
) -> None:
    """Print the fidelity report of an artifact.

    Prints six lines: verdict, size, KL, benchmarks, page, and the next command; with --full every
    table before them. With --html, write its HTML page again. With --log-to, log figures, page and
    hash, and print where.

    Example: quantkit report artifacts/tiny-v3-awq4 --full
    """
    if tracker and html_out:
        raise UsageError("--log-to and --html: expected one of them; log the artifact first")
    if output and not html_out:
        raise UsageError(
            "--output: expected --html with it; tables and JSON go to the standard output"
        )
    if tracker:
        place = log_artifact(tracker, artifact)
        print_json({"logged": place}) if json_out else click.echo(place)
        return
    if html_out:
        page = rebuild_page(artifact, output)
        print_json({"html": str(page)}) if json_out else click.echo(page)
        return
    fidelity = read_artifact_report(artifact)
    if json_out:
        print_json(fidelity.model_dump(mode="json"))
    else:
        show(render_results([(artifact, fidelity)], full=full))
