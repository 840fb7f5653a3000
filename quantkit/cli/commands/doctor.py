"""`quantkit doctor`: check the environment."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import handle_errors, print_json
from quantkit.cli.options import JSON
from quantkit.errors import QuantkitError


@click.command()
@JSON
@handle_errors
def command(json_out: bool) -> None:
    """Check the environment: packages, devices, sandbox, hub, disk.

    Lists what works and what a missing part disables. Asks the hub once and starts a sandbox; no
    token is printed. Exits with 1 if something that quantkit needs is broken.

    Example: quantkit doctor
    """
    # `quantkit doctor --help` starts without torch and pydantic
    from quantkit.cli.rich_output import show
    from quantkit.doctor import check_environment
    from quantkit.report.table import Table
    from quantkit.report.terminal import render_table

    checks = check_environment(Path.cwd())
    if json_out:
        print_json([check.model_dump() for check in checks])
    else:
        rows = tuple((c.name, c.state, c.value, c.effect) for c in checks)
        show(
            render_table(
                Table(title="Environment", columns=("check", "state", "found", "effect"), rows=rows)
            )
        )
    if broken := [check for check in checks if check.state == "broken"]:
        raise QuantkitError(
            "; ".join(f"{check.name}: {check.value}; {check.effect}" for check in broken)
        )
