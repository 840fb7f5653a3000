"""`quantkit cost`: own or rented cards against APIs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from quantkit.cli.console import as_json, handle_errors, show
from quantkit.cli.options import JSON
from quantkit.errors import QuantkitError, UsageError


@click.command()
@click.argument("assumptions", required=False, type=click.Path(path_type=Path))
@click.option(
    "--defaults",
    is_flag=True,
    help="Print the assumptions that ship with quantkit, every key explained.",
)
@click.option("--html", "html_out", is_flag=True, help="Make one page for people, with plots.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the page here.")
@JSON
@handle_errors
def COMMAND(
    assumptions: Path | None, defaults: bool, html_out: bool, output: Path | None, json_out: bool
) -> None:
    """Compare owned and rented cards with API prices per million tokens, each figure with its arithmetic.

    ASSUMPTIONS is a YAML file; without it, the assumptions that ship with quantkit. Figures that its `claimed:` names
    are redone; exits with 1 when one is wrong.

    \b
    Example: quantkit cost --defaults > mine.yaml
             quantkit cost mine.yaml --html --output cost.html
    """
    from quantkit.serve.cost import assumptions as files
    from quantkit.serve.cost import tables
    from quantkit.serve.cost.claims import recompute_claims
    from quantkit.serve.cost.figures import figures
    from quantkit.serve.cost.sensitivity import compute_sensitivity

    if html_out and json_out:
        raise UsageError("--html, --json: expected one of them at most")
    if html_out and output is None and sys.stdout.isatty():
        raise UsageError(
            "--html: expected --output FILE with it, or a redirection; a terminal shows no page"
        )
    if output and not html_out:
        raise UsageError(
            "--output: expected --html with it; tables and JSON go to the standard output"
        )
    if defaults:
        click.echo(files.read_default_text(), nl=False)
        return
    name = str(assumptions) if assumptions else "assumptions.yaml"
    found = (
        files.read_assumptions(assumptions)
        if assumptions
        else files.parse_assumptions(files.read_default_text(), name)
    )
    made = figures(found)
    moved, claimed = compute_sensitivity(found), recompute_claims(found, made, name)
    if json_out:
        as_json(tables.serialize_costs(found, made, moved, claimed))
    elif html_out:
        from quantkit.io.files import write_output
        from quantkit.serve.cost.page import render_page

        page = render_page(found, made, moved, claimed)
        if output:
            write_output(output, page.encode())
        click.echo(output if output else page, nl=output is not None)
    else:
        from rich.text import Text

        from quantkit.report.terminal import render_table, strip_control_characters

        head = Text(strip_control_characters(found.title), style="bold")
        head.append(
            "\n" + strip_control_characters(tables.format_ranking(found, made)) + "\n",
            style="not bold",
        )
        show(
            head, *(render_table(each) for each in tables.make_tables(found, made, moved, claimed))
        )
    wrong = [claim for claim in claimed if not claim.right]
    if wrong:
        told = "; ".join(claim.told for claim in wrong)
        raise QuantkitError(
            f"{name}: claimed: {len(wrong)} of {len(claimed)} figures do not come out: {told}"
        )
