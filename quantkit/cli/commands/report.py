"""`quantkit report`: an artifact's report again."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import handle_errors, print_json, show
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
def command(artifact: Path, html_out: bool, output: Path | None, json_out: bool) -> None:
    """Print an artifact's fidelity report again, or make its page again.

    Example: quantkit report artifacts/tiny-v3-awq4 --html --output review.html
    """
    from quantkit.artifact.read_report import read_artifact
    from quantkit.report.terminal import fidelity_view

    if output and not html_out:
        raise UsageError(
            "--output: expected --html with it; tables and JSON go to the standard output"
        )
    if html_out:
        from quantkit.report.html import rebuild

        page = rebuild(artifact, output)
        print_json({"html": str(page)}) if json_out else click.echo(page)
        return
    found = read_artifact(artifact)
    if json_out:
        print_json(found.model_dump(mode="json"))
    else:
        show(fidelity_view(found))
