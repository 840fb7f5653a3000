"""`quantkit publish`: an artifact to a hub, a store, a registry or a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from quantkit.cli.console import ProgressBar, as_json, handle_errors
from quantkit.cli.options import DRY_RUN, JOBS, JSON, TRIES


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("dest")
@click.option("--force", is_flag=True, help="Publish an artifact that was rejected or not judged.")
@click.option("--overwrite", is_flag=True, help="Replace another artifact at DEST.")
@click.option(
    "--revision", metavar="BRANCH", help="Hugging Face: the branch; made when it is not there."
)
@click.option("--private", is_flag=True, help="Hugging Face: a repository that is made is private.")
@JOBS
@TRIES
@DRY_RUN
@JSON
@handle_errors
def COMMAND(  # noqa: PLR0913  # every one is an option
    artifact: Path, dest: str, force: bool, overwrite: bool, revision: str | None, private: bool, jobs: int,
    tries: int, dry_run: bool, json_out: bool,
) -> None:  # fmt: skip
    """Verify an artifact and send it to DEST: what is there by hash is not sent again, the manifest comes last.

    DEST is a folder, hf://owner/name, s3://bucket/prefix, gs://bucket/prefix or oci://host/name:tag. Credentials come
    from `hf auth login`, AWS profiles and variables, or `docker login`. Interrupted, the same command goes on.

    Example: quantkit publish artifacts/tiny-v3-awq4 s3://models/tiny-v3-awq4
    """
    from quantkit.io.retry import RetryPolicy
    from quantkit.publish.publish import publish_artifact
    from quantkit.publish.remote import RemoteOptions
    from quantkit.publish.transfer import format_bytes

    options = RemoteOptions(
        revision=revision,
        private=private,
        jobs=jobs,
        retry_policy=RetryPolicy(tries=tries),
        writing=True,
    )
    with ProgressBar(sys.stderr.isatty() and not json_out) as meter:
        done = publish_artifact(
            artifact, dest, options, meter.tell, force=force, overwrite=overwrite, dry_run=dry_run
        )
    if json_out:
        as_json({"artifact": str(artifact), "dry_run": dry_run, **done.values()})
        return
    click.echo(
        f"{done.place}: {'would send' if dry_run else 'sent'} {len(done.files)} files, {format_bytes(done.n_bytes)}; "
        f"{done.there} files, {format_bytes(done.there_bytes)} were there"
    )
    for name in done.files if dry_run else ():
        click.echo(f"  {name}")
    for name in done.removed:
        click.echo(f"  {'would remove' if dry_run else 'removed'} {name}")
