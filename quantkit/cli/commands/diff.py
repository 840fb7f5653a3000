"""`quantkit diff`: what differs between two artifacts."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from quantkit.cli.console import as_json, handle_errors, printable, show
from quantkit.cli.options import JSON
from quantkit.errors import UsageError


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--markdown", "markdown_out", is_flag=True, help="Print Markdown for a pull request's comment."
)
@click.option("--html", "html_out", is_flag=True, help="Make one page for people.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Write here instead of to the standard output.",
)
@click.option(
    "--partial",
    is_flag=True,
    help="Leave out what does not compare, and say so, instead of refusing.",
)
@JSON
@handle_errors
def COMMAND(
    a: str,
    b: str,
    markdown_out: bool,
    html_out: bool,
    output: Path | None,
    partial: bool,
    json_out: bool,
) -> None:
    """Compare B with A: recipe, plan, tensors, size, errors, distributions, benchmarks item by item.

    A and B are artifacts, their fidelity.json files, or an artifact and its source (a folder or builtin:NAME). Exits
    with 0 whatever differs, and with 1 where the two were made from other sources or measured on other text or prompts.

    Example: quantkit diff artifacts/tiny-v3-rtn4 artifacts/tiny-v3-awq4 --html --output diff.html
    """
    from quantkit.diff.compare import compare_sides
    from quantkit.diff.render_text import render_markdown, render_terminal
    from quantkit.diff.sides import read_sides
    from quantkit.io.files import write_output

    if markdown_out + html_out + json_out > 1:
        raise UsageError("--markdown, --html, --json: expected one of them at most")
    if html_out and output is None and sys.stdout.isatty():
        raise UsageError(
            "--html: expected --output FILE with it, or a redirection; a terminal shows no page"
        )
    if output and not (markdown_out or html_out):
        raise UsageError(
            "--output: expected --markdown or --html with it; tables and JSON go to the standard output"
        )
    first, second = read_sides(a, b)
    found = compare_sides(first, second, partial=partial)
    if json_out:
        as_json(found.model_dump(mode="json"))
    elif markdown_out or html_out:
        from quantkit.diff.page import render_page

        text = (
            render_page(found, first.tokens, second.tokens) if html_out else render_markdown(found)
        )
        if output:
            write_output(output, text.encode())
        click.echo(output or (text if html_out else printable(text)), nl=output is not None)
    else:
        show(render_terminal(found))
