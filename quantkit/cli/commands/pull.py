"""`quantkit pull`: an artifact from a hub, a store, a registry or a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from quantkit.cli.console import ProgressBar, as_json, handle_errors
from quantkit.cli.options import DRY_RUN, JOBS, JSON, TRIES


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
def COMMAND(
    src: str,
    folder: Path,
    overwrite: bool,
    revision: str | None,
    jobs: int,
    tries: int,
    dry_run: bool,
    json_out: bool,
) -> None:
    """Fetch an artifact from SRC, verify it, and only then name it DIR.

    SRC is what `quantkit publish` takes as DEST. It arrives in DIR.pulling; interrupted, the same command goes on.

    Example: quantkit pull s3://models/tiny-v3-awq4 artifacts/tiny-v3-awq4
    """
    from quantkit.io.retry import RetryPolicy
    from quantkit.publish.pull import pull_artifact
    from quantkit.publish.remote import RemoteOptions
    from quantkit.publish.transfer import format_bytes

    options = RemoteOptions(revision=revision, jobs=jobs, retry_policy=RetryPolicy(tries=tries))
    with ProgressBar(sys.stderr.isatty() and not json_out) as meter:
        done = pull_artifact(src, folder, options, meter.tell, overwrite=overwrite, dry_run=dry_run)
    if json_out:
        as_json({
            "folder": str(folder),
            "dry_run": dry_run,
            "verified": not dry_run,
            **done.values(),
        })
        return
    said = "would fetch" if dry_run else "verified; fetched"
    click.echo(
        f"{folder}: {said} {len(done.files)} files, {format_bytes(done.n_bytes)}; {done.there} files, "
        f"{format_bytes(done.there_bytes)} were there ({done.status})"
    )
    for name in done.files if dry_run else ():
        click.echo(f"  {name}")
