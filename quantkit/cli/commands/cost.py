"""`quantkit cost`: compare GPUs with API prices."""

from __future__ import annotations

from pathlib import Path

import click
from rich.text import Text

from quantkit.cli.console import handle_errors, print_json
from quantkit.cli.options import JSON, check_page_options
from quantkit.cli.rich_output import show
from quantkit.errors import QuantkitError, UsageError
from quantkit.io.files import write_output
from quantkit.report.terminal import render_table, strip_control_characters
from quantkit.serve.cost import assumptions as assumption_files
from quantkit.serve.cost import tables
from quantkit.serve.cost.claims import recompute_claims
from quantkit.serve.cost.cost_items import compute_cost_items
from quantkit.serve.cost.page import render_page
from quantkit.serve.cost.sensitivity import compute_sensitivity


@click.command()
@click.argument("assumptions", required=False, type=click.Path(path_type=Path))
@click.option(
    "--defaults",
    is_flag=True,
    help="Print the default assumptions, with every key explained.",
)
@click.option("--html", "html_out", is_flag=True, help="Write one HTML page with plots.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the page to this file.")
@JSON
@handle_errors
def command(
    assumptions: Path | None, defaults: bool, html_out: bool, output: Path | None, json_out: bool
) -> None:
    """Compare owned and rented GPUs with API prices per million tokens.

    Each figure is printed with its arithmetic. ASSUMPTIONS is a YAML file; the default are the
    assumptions that ship with quantkit. Figures under its key `claimed:` are computed again; exits
    with 1 if one is wrong.

    \b
    Example: quantkit cost --defaults > mine.yaml
             quantkit cost mine.yaml --html --output cost.html
    """
    if html_out and json_out:
        raise UsageError("--html, --json: expected one of them at most")
    check_page_options(html=html_out, output=output)
    if output and not html_out:
        raise UsageError(
            "--output: expected --html with it; tables and JSON go to the standard output"
        )
    if defaults:
        click.echo(assumption_files.read_default_text(), nl=False)
        return
    name = str(assumptions) if assumptions else "assumptions.yaml"
    inputs = (
        assumption_files.read_assumptions(assumptions)
        if assumptions
        else assumption_files.parse_assumptions(assumption_files.read_default_text(), name)
    )
    costs = compute_cost_items(inputs)
    changes, claims = compute_sensitivity(inputs), recompute_claims(inputs, costs, name)
    if json_out:
        print_json(tables.serialize_costs(inputs, costs, changes, claims))
    elif html_out:
        page = render_page(inputs, costs, changes, claims)
        if output:
            write_output(output, page.encode())
        click.echo(output if output else page, nl=output is not None)
    else:
        head = Text(strip_control_characters(inputs.title), style="bold")
        head.append(
            "\n" + strip_control_characters(tables.format_ranking(inputs, costs)) + "\n",
            style="not bold",
        )
        show(
            head,
            *(render_table(part) for part in tables.make_tables(inputs, costs, changes, claims)),
        )
    wrong = [claim for claim in claims if not claim.is_correct]
    if wrong:
        raise QuantkitError(
            f"{name}: claimed: {len(wrong)} of {len(claims)} figures do not come out: "
            + "; ".join(claim.message for claim in wrong)
        )
