"""`quantkit pull`: download an artifact from a hub, an object store, a registry or a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from quantkit.cli.console import echo, handle_errors, print_json
from quantkit.cli.options import DRY_RUN, JOBS, JSON, TRIES
from quantkit.cli.rich_output import ProgressBar
from quantkit.io.retry import RetryPolicy
from quantkit.publish.pull import pull_artifact
from quantkit.publish.remote import RemoteOptions
from quantkit.publish.transfer import format_bytes


@click.command()
@click.argument("src")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace another artifact at DIR.")
@click.option("--revision", metavar="NAME", help="Hugging Face: a branch, tag or commit.")
@JOBS
@TRIES
@DRY_RUN
@JSON
@handle_errors
def command(
    src: str,
    folder: Path,
    overwrite: bool,
    revision: str | None,
    jobs: int,
    tries: int,
    dry_run: bool,
    json_out: bool,
) -> None:
    """Download an artifact from SRC and verify it.

    SRC is an address that `quantkit publish` takes as DEST. The files are written to DIR.pulling,
    which is renamed to DIR after verification. If interrupted, the same command resumes.

    Example: quantkit pull s3://models/tiny-v3-awq4 artifacts/tiny-v3-awq4
    """
    options = RemoteOptions(revision=revision, jobs=jobs, retry_policy=RetryPolicy(tries=tries))
    with ProgressBar(sys.stderr.isatty() and not json_out) as progress_bar:
        done = pull_artifact(
            src, folder, options, progress_bar.update, overwrite=overwrite, dry_run=dry_run
        )
    if json_out:
        print_json({
            "folder": str(folder),
            "dry_run": dry_run,
            "verified": not dry_run,
            **done.values(),
        })
        return
    action = "would fetch" if dry_run else "verified; fetched"
    echo(
        f"{folder}: {action} {len(done.files)} files, {format_bytes(done.n_bytes)}; "
        f"{done.n_present} files, {format_bytes(done.present_bytes)} were there ({done.status})"
    )
    for name in done.files if dry_run else ():
        echo(f"  {name}")
