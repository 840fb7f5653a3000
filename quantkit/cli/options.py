"""Options that several commands share, and checks of their combinations."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import click

from quantkit.errors import UsageError

SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."
)
JSON = click.option("--json", "json_out", is_flag=True, help="Print JSON instead of tables.")
JOBS = click.option("--jobs", type=click.IntRange(1, 64), default=4, help="Parallel transfers (4).")
TRIES = click.option(
    "--tries",
    type=click.IntRange(1),
    default=8,
    help="Consecutive failures without progress before giving up (8).",
)
DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Transfer nothing; print the files and their total size."
)
TRUST_TASK_CODE = click.option(
    "--trust-task-code",
    "trusted_code",
    multiple=True,
    metavar="SHA256",
    help="Run a task's own Python if its file has this hash; the refusal prints it.",
)
JUNIT = click.option(
    "--junit", type=click.Path(path_type=Path), help="Write the gates as JUnit XML, for CI systems."
)


def parse_overrides(pairs: Iterable[str]) -> dict[str, str]:
    """Return the values of --set by key; UsageError for one without "="."""
    parts = [pair.partition("=") for pair in pairs]
    if any(not separator for _, separator, _ in parts):
        raise UsageError("--set: expected KEY=VALUE, e.g. --set output.path=artifacts/other")
    return {key: value for key, _, value in parts}


def check_page_options(*, html: bool, output: Path | None) -> None:
    """Raise UsageError if an HTML page would be printed to a terminal."""
    if html and output is None and sys.stdout.isatty():
        raise UsageError(
            "--html: expected --output FILE with it, or a redirection; a terminal shows no page"
        )
