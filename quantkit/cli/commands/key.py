"""`quantkit key`: create API keys for the gateway."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import handle_errors
from quantkit.errors import UsageError
from quantkit.io.files import read_json, write_json
from quantkit.serve.gateway.api_keys import create_key, parse_keys


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
    help="The most urgent priority its requests may have; 0 is first.",
)
@click.option(
    "--most",
    type=click.IntRange(0),
    default=0,
    help="Its concurrent requests; 0: the limit of the gateway.",
)
@handle_errors
def command(name: str, file: Path, priority: int, most: int) -> None:
    """Create an API key for the gateway.

    Adds the hash of the key to a file and prints the key, once: it is stored nowhere.

    Example: quantkit key team-a --keys keys.json --priority 3 --most 8
    """
    existing = parse_keys(read_json(file, UsageError), str(file)) if file.exists() else ()
    text, entry = create_key(name, priority=priority, most=most)
    entries = [key.model_dump() for key in (*existing, entry)]
    parse_keys({"keys": entries}, str(file))  # refuses a second key of the same name
    write_json(file, {"keys": entries})
    click.echo(text)
