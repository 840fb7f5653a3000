"""`--log-to`: the option of build and report, and its warnings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from quantkit.cli.console import escape_controls
from quantkit.errors import QuantkitError

LOG_TO = click.option(
    "--log-to",
    "tracker",
    type=click.Choice(("mlflow", "wandb")),
    help="Log figures, page and hash as a run of MLflow or Weights & Biases.",
)


def check_tracker_option(tracker: str | None) -> None:
    """Raise UsageError if the client of a tracker is not installed: before hours of a build."""
    if tracker:
        from quantkit.tracking.log_run import check_tracker

        check_tracker(tracker)


def log_results(tracker: str | None, artifacts: Iterable[Path]) -> None:
    """Log finished artifacts; a tracker that fails is a warning, because they are complete."""
    if tracker is None:
        return
    from quantkit.tracking.log_run import log_artifact

    for artifact in artifacts:
        try:
            click.echo(f"logged: {escape_controls(log_artifact(tracker, artifact))}", err=True)
        except QuantkitError as fault:
            click.echo(f"warning: tracker-failed: {escape_controls(str(fault))}", err=True)
