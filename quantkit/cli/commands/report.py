"""`quantkit report`: an artifact's report again."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import as_json, handle_errors, show
from quantkit.cli.options import JSON
from quantkit.errors import UsageError


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--html",
    "html_out",
    is_flag=True,
    help="Make quantkit/fidelity.html again, the page for people.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write the page here, not into the artifact."
)
@JSON
@handle_errors
def COMMAND(artifact: Path, html_out: bool, output: Path | None, json_out: bool) -> None:
    """Print an artifact's fidelity report again, or make its page again.

    Example: quantkit report artifacts/tiny-v3-awq4 --html --output review.html
    """
    from quantkit.artifact.read_report import read_artifact_report
    from quantkit.report.terminal import render_report

    if output and not html_out:
        raise UsageError(
            "--output: expected --html with it; tables and JSON go to the standard output"
        )
    if html_out:
        from quantkit.report.html_page import rebuild_page

        page = rebuild_page(artifact, output)
        as_json({"html": str(page)}) if json_out else click.echo(page)
        return
    found = read_artifact_report(artifact)
    if json_out:
        as_json(found.model_dump(mode="json"))
    else:
        show(render_report(found))
