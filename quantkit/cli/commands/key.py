"""`quantkit key`: create API keys for the gateway."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from quantkit.cli.console import handle_errors
from quantkit.errors import UsageError
from quantkit.io.files import read_json, write_json
from quantkit.io.lock import hold_lock
from quantkit.serve.gateway.api_keys import create_key, parse_keys

LOCK_SECONDS = 60
"""Time to wait for other calls; each holds the lock for milliseconds."""


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

    Adds the hash of the key to a file and prints the key, once: it is stored nowhere. The file is
    readable by its owner only. Calls that run at the same time wait for each other.

    Example: quantkit key team-a --keys keys.json --priority 3 --most 8
    """
    file = file.resolve()  # a link stays a link
    lock = file.with_name(f"{file.name}.lock")
    with private_files(), hold_lock(lock, "change of the keys", "another file", LOCK_SECONDS):
        existing = parse_keys(read_json(file, UsageError), str(file)) if file.exists() else ()
        text, entry = create_key(name, priority=priority, most=most)
        entries = [key.model_dump() for key in (*existing, entry)]
        parse_keys({"keys": entries}, str(file))  # refuses a second key of the same name
        write_json(file, {"keys": entries})
    click.echo(text)


@contextmanager
def private_files() -> Iterator[None]:
    """Create files with mode 0600, whatever the user's umask: there is no moment with another."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
