"""`quantkit key`: who may ask a gateway."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import handle_errors
from quantkit.errors import UsageError


@click.command()
@click.argument("name")
@click.option(
    "--keys",
    "file",
    type=click.Path(path_type=Path),
    required=True,
    help="The file of `serve --keys`.",
)
@click.option(
    "--priority",
    type=click.IntRange(0, 9),
    default=0,
    help="The most urgent it may ask with; 0 is first.",
)
@click.option(
    "--most",
    type=click.IntRange(0),
    default=0,
    help="Its requests at once; 0: the gateway's bound.",
)
@handle_errors
def COMMAND(name: str, file: Path, priority: int, most: int) -> None:
    """Make an API key, add its hash to a file, and print the key: once, it is stored nowhere.

    Example: quantkit key team-a --keys keys.json --priority 3 --most 8
    """
    from quantkit.io.files import read_json, write_json
    from quantkit.serve.gateway.api_keys import create_key, parse_keys

    there = parse_keys(read_json(file, UsageError), str(file)) if file.exists() else ()
    text, entry = create_key(name, priority=priority, most=most)
    entries = [key.model_dump() for key in (*there, entry)]
    parse_keys({"keys": entries}, str(file))  # a name that is there already
    write_json(file, {"keys": entries})
    click.echo(text)
