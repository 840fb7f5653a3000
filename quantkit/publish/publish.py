"""Publishing an artifact: verify it here, look what is there by hash, send the rest in parallel, the manifest last.

An interrupted publication is no artifact to anybody who pulls, and goes on with what arrived.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from quantkit.artifact.layout import LOADTEST, LOADTEST_PAGE, MANIFEST, SIGNATURE
from quantkit.errors import ArtifactError, QuantkitError, TransferError
from quantkit.io.files import parse_json, read_json, sha256_file, shorten_repr
from quantkit.io.path_safety import find_name_faults
from quantkit.io.retry import RetryPolicy, retry
from quantkit.progress import ProgressCallback
from quantkit.publish.remote import Remote, RemoteOptions, RemoteState, UploadFile, open_remote
from quantkit.publish.transfer import (
    Transfer,
    TransferProgress,
    check_file_names,
    note_resume,
    parse_files,
    parse_unhashed,
    run_in_parallel,
)
from quantkit.verify.shallow import verify_artifact

ACCEPTED = "accepted"


def publish_artifact(
    artifact: Path, dest: str, options: RemoteOptions, tell: ProgressCallback, *,
    force: bool = False, overwrite: bool = False, dry_run: bool = False,
) -> Transfer:  # fmt: skip
    """Send an artifact to a place; ArtifactError for one that is not what its manifest says or was not accepted."""
    with note_resume(), closing(open_remote(dest, options)) as remote:
        status = verify_artifact(artifact).status
        if status != ACCEPTED and not force:
            raise ArtifactError(
                f"{artifact}: expected an accepted artifact, found one that is {status}; build one that keeps the "
                "gates of its recipe, or pass --force"
            )
        items, manifest = list_upload_files(artifact)
        found = retry(
            lambda: remote.list_remote(items, MANIFEST), remote.where, options.retry_policy
        )
        gone = find_replaced_files(found, items, manifest, remote.where, overwrite)
        new = [item for item in items if item.name not in found.there]
        whole = (
            not new
            and not gone
            and hashlib.sha256(found.manifest or b"").hexdigest() == manifest.sha256
        )
        names = () if whole else (*(item.name for item in new), MANIFEST)
        moved = sum(item.n_bytes for item in (*new, manifest)) if names else 0
        place = remote.where
        if names and not dry_run:
            retry(lambda: remote.begin_upload(gone), remote.where, options.retry_policy)
            tally = TransferProgress("publish", moved, tell)
            run_in_parallel(
                new,
                lambda item: send_file(remote, item, tally, options.retry_policy),
                options.jobs,
                tally.stop,
            )
            place = retry(
                lambda: remote.finalize(items, manifest), remote.where, options.retry_policy
            )
            tally.report_bytes(MANIFEST, manifest.n_bytes)
    total = sum(item.n_bytes for item in (*items, manifest))
    return Transfer(
        place=place, status=status, files=names, n_bytes=moved, there=len(items) + 1 - len(names),
        there_bytes=total - moved, manifest=manifest.sha256, removed=tuple(n for n in gone if n != MANIFEST),
    )  # fmt: skip


def list_upload_files(artifact: Path) -> tuple[list[UploadFile], UploadFile]:
    """The files of an artifact that was verified, the largest first, and its manifest.

    A load test's figures go along, its page does not: nobody could tell whether that is the page of these figures.
    """
    hashes = parse_files(read_json(artifact / MANIFEST, ArtifactError), str(artifact))
    items = []
    for path in (path for path in artifact.rglob("*") if path.is_file()):
        name = path.relative_to(artifact).as_posix()
        if name == LOADTEST_PAGE:
            continue
        known = hashes.get(name)
        sha256 = known.sha256 if known and known.sha256 else sha256_file(path, ArtifactError)
        items.append(UploadFile(name=name, path=path, n_bytes=path.stat().st_size, sha256=sha256))
    check_file_names((item.name for item in items), str(artifact))
    manifest = next(item for item in items if item.name == MANIFEST)
    return sorted(
        (i for i in items if i is not manifest), key=lambda i: (-i.n_bytes, i.name)
    ), manifest


def find_replaced_files(
    found: RemoteState,
    items: Sequence[UploadFile],
    manifest: UploadFile,
    where: str,
    overwrite: bool,
) -> tuple[str, ...]:
    """What must go before another artifact can be there, the manifest first; TransferError when it may not."""
    same = (
        found.manifest is not None and hashlib.sha256(found.manifest).hexdigest() == manifest.sha256
    )
    if found.manifest is not None and not same and not overwrite:
        raise TransferError(
            f"{where}: expected no other artifact, found one; choose another place, or pass --overwrite"
        )
    named = parse_manifest_names(found.manifest) if found.manifest is not None else set[str]()
    strangers = [name for name in found.others if name not in named]
    if strangers and not overwrite:
        raise TransferError(
            f"{where}: expected an empty place or this artifact, found {len(strangers)} other files, the first "
            f"{shorten_repr(strangers[0])}; choose another place, or pass --overwrite"
        )
    if same:  # a signature that this copy lacks stays
        return (MANIFEST,) if any(item.name not in found.there for item in items) else ()
    gone = (name for name in found.others if name in named)
    return (MANIFEST, *sorted(gone)) if found.manifest is not None else ()


def parse_manifest_names(manifest: bytes) -> set[str]:
    """The good names in a manifest that somebody else wrote; none in one that cannot be read."""
    try:
        values = parse_json(manifest, MANIFEST, TransferError)
        files = {*parse_files(values, MANIFEST), *parse_unhashed(values), SIGNATURE, LOADTEST}
    except QuantkitError:
        return set()
    return set() if any(find_name_faults(files)) else files


def send_file(
    remote: Remote, item: UploadFile, tally: TransferProgress, patience: RetryPolicy
) -> None:
    """Send one file, again while anything of it arrives."""
    best = 0

    def report_bytes(n_bytes: int) -> None:
        nonlocal best
        best = max(best, n_bytes)
        tally.report_bytes(item.name, n_bytes)

    retry(
        lambda: remote.send(item, report_bytes),
        f"{remote.where}: {item.name}",
        patience,
        lambda: best,
        tally.stop,
    )
