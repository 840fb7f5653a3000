"""`quantkit publish`: upload an artifact to a hub, an object store, a registry or a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from quantkit.cli.console import echo, handle_errors, print_json
from quantkit.cli.options import DRY_RUN, JOBS, JSON, TRIES
from quantkit.cli.rich_output import ProgressBar
from quantkit.errors import TransferError
from quantkit.io.retry import RetryPolicy
from quantkit.publish.publish import publish_artifact
from quantkit.publish.remote import RemoteOptions
from quantkit.publish.transfer import format_bytes


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("dest")
@click.option(
    "--force", is_flag=True, help="Publish an artifact whose status is rejected or not judged."
)
@click.option("--overwrite", is_flag=True, help="Replace another artifact at DEST.")
@click.option(
    "--revision", metavar="BRANCH", help="Hugging Face: the branch; created if it does not exist."
)
@click.option("--private", is_flag=True, help="Hugging Face: create the repository as private.")
@click.option(
    "--collection",
    metavar="SLUG",
    help="Hugging Face: add the model to this collection, owner/title-HASH as in its address.",
)
@JOBS
@TRIES
@DRY_RUN
@JSON
@handle_errors
def command(  # noqa: PLR0913  # one parameter per option
    artifact: Path, dest: str, force: bool, overwrite: bool, revision: str | None, private: bool,
    collection: str | None, jobs: int, tries: int, dry_run: bool, json_out: bool,
) -> None:  # fmt: skip
    """Verify an artifact and upload it to DEST.

    Files that DEST has already, by hash, are not sent again; the manifest is sent last. DEST is a
    folder, hf://owner/name, s3://bucket/prefix, gs://bucket/prefix or oci://host/name:tag.
    Credentials come from `hf auth login`, AWS profiles and variables, or `docker login`. If
    interrupted, the same command resumes.

    Example: quantkit publish artifacts/tiny-v3-awq4 s3://models/tiny-v3-awq4
    """
    options = RemoteOptions(
        revision=revision,
        private=private,
        jobs=jobs,
        retry_policy=RetryPolicy(tries=tries),
        writing=True,
    )
    add = prepare_collection(dest, collection, options.retry_policy) if collection else None
    with ProgressBar(sys.stderr.isatty() and not json_out) as progress_bar:
        done = publish_artifact(
            artifact,
            dest,
            options,
            progress_bar.update,
            force=force,
            overwrite=overwrite,
            dry_run=dry_run,
        )
    if add and not dry_run:
        try:
            add()
        except TransferError as fault:
            raise TransferError(
                f"{done.location} is published, but not in the collection: {fault}"
            ) from fault
    if json_out:
        print_json({
            "artifact": str(artifact),
            "dry_run": dry_run,
            "collection": collection,
            **done.values(),
        })
        return
    echo(
        f"{done.location}: {'would send' if dry_run else 'sent'} {len(done.files)} files, "
        f"{format_bytes(done.n_bytes)}; {done.n_present} files, {format_bytes(done.present_bytes)} "
        "were there"
    )
    for name in done.files if dry_run else ():
        echo(f"  {name}")
    if collection:
        echo(f"  {'would be' if dry_run else 'is'} in the collection {collection}")
    for name in done.removed:
        echo(f"  {'would remove' if dry_run else 'removed'} {name}")


def prepare_collection(dest: str, collection: str, policy: RetryPolicy) -> Callable[[], None]:
    """Check a collection and return what adds the model to it; raises UsageError."""
    from quantkit.publish.remotes import hf  # huggingface_hub

    hf.check_collection(dest, collection)
    return partial(hf.add_to_collection, dest, collection, policy)
