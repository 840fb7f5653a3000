"""`quantkit diff`: compare two artifacts."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import escape_controls, handle_errors, print_json
from quantkit.cli.options import JSON, check_page_options
from quantkit.cli.rich_output import show
from quantkit.diff.compare import compare_sides
from quantkit.diff.page import render_page
from quantkit.diff.render_text import render_markdown, render_terminal
from quantkit.diff.sides import read_sides
from quantkit.errors import UsageError
from quantkit.io.files import write_output


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--markdown", "markdown_out", is_flag=True, help="Print Markdown for a pull request's comment."
)
@click.option("--html", "html_out", is_flag=True, help="Write one HTML page.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Write to this file instead of the standard output.",
)
@click.option(
    "--partial",
    is_flag=True,
    help="Omit parts that cannot be compared, and name them, instead of failing.",
)
@JSON
@handle_errors
def command(
    a: str,
    b: str,
    markdown_out: bool,
    html_out: bool,
    output: Path | None,
    partial: bool,
    json_out: bool,
) -> None:
    """Compare artifact B with A.

    Covers recipe, plan, tensors, size, errors, distributions and benchmarks, item by item. A and B
    are artifacts, their fidelity.json files, or an artifact and its source (a folder or
    builtin:NAME). Exits with 0 whatever differs, and with 1 if the two have different sources or
    were measured on different text or prompts.

    Example: quantkit diff artifacts/tiny-v3-rtn4 artifacts/tiny-v3-awq4 --html --output diff.html
    """
    if markdown_out + html_out + json_out > 1:
        raise UsageError("--markdown, --html, --json: expected one of them at most")
    check_page_options(html=html_out, output=output)
    if output and not (markdown_out or html_out):
        raise UsageError(
            "--output: expected --markdown or --html with it; tables and JSON go to the standard "
            "output"
        )
    first, second = read_sides(a, b)
    comparison = compare_sides(first, second, partial=partial)
    if json_out:
        print_json(comparison.model_dump(mode="json"))
    elif markdown_out or html_out:
        text = (
            render_page(comparison, first.tokens, second.tokens)
            if html_out
            else render_markdown(comparison)
        )
        if output:
            write_output(output, text.encode())
        click.echo(output or (text if html_out else escape_controls(text)), nl=output is not None)
    else:
        show(render_terminal(comparison))
