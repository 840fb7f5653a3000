"""Publish an artifact: verify it, compare the remote by hash, send missing files, then the
manifest.

Without its manifest a publication is not an artifact, so an interrupted one cannot be pulled. The
next run resumes with the files that arrived.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from quantkit.artifact.layout import LOADTEST, MANIFEST, SIGNATURE
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
    artifact: Path, dest: str, options: RemoteOptions, on_progress: ProgressCallback, *,
    force: bool = False, overwrite: bool = False, dry_run: bool = False,
) -> Transfer:  # fmt: skip
    """Publish an artifact to the address `dest`.

    Raises ArtifactError if the artifact does not verify, or was not accepted and `force` is false.
    """
    with note_resume(), closing(open_remote(dest, options)) as remote:
        status = verify_artifact(artifact).status
        if status != ACCEPTED and not force:
            raise ArtifactError(
                f"{artifact}: expected an accepted artifact, found one that is {status}; build one "
                "that meets the gates of its recipe, or pass --force"
            )
        items, manifest = list_upload_files(artifact)
        state = retry(
            lambda: remote.list_remote(items, MANIFEST), remote.where, options.retry_policy
        )
        gone = find_replaced_files(state, items, manifest, remote.where, overwrite)
        new = [item for item in items if item.name not in state.present]
        is_complete = (
            not new
            and not gone
            and hashlib.sha256(state.manifest or b"").hexdigest() == manifest.sha256
        )
        names = () if is_complete else (*(item.name for item in new), MANIFEST)
        moved = sum(item.n_bytes for item in (*new, manifest)) if names else 0
        location = remote.where
        if names and not dry_run:
            retry(lambda: remote.begin_upload(gone), remote.where, options.retry_policy)
            progress = TransferProgress("publish", moved, on_progress)
            run_in_parallel(
                new,
                lambda item: send_file(remote, item, progress, options.retry_policy),
                options.jobs,
                progress.stop,
            )
            location = retry(
                lambda: remote.finalize(items, manifest), remote.where, options.retry_policy
            )
            progress.report_bytes(MANIFEST, manifest.n_bytes)
    total = sum(item.n_bytes for item in (*items, manifest))
    return Transfer(
        location=location,
        status=status,
        files=names,
        n_bytes=moved,
        n_present=len(items) + 1 - len(names),
        present_bytes=total - moved,
        manifest=manifest.sha256,
        removed=tuple(n for n in gone if n != MANIFEST),
    )


def list_upload_files(artifact: Path) -> tuple[list[UploadFile], UploadFile]:
    """Return the files of a verified artifact, largest first, and its manifest."""
    hashes = parse_files(read_json(artifact / MANIFEST, ArtifactError), str(artifact))
    items = []
    for path in (path for path in artifact.rglob("*") if path.is_file()):
        name = path.relative_to(artifact).as_posix()
        entry = hashes.get(name)
        sha256 = entry.sha256 if entry and entry.sha256 else sha256_file(path, ArtifactError)
        items.append(UploadFile(name=name, path=path, n_bytes=path.stat().st_size, sha256=sha256))
    check_file_names((item.name for item in items), str(artifact))
    manifest = next(item for item in items if item.name == MANIFEST)
    return sorted(
        (i for i in items if i is not manifest), key=lambda i: (-i.n_bytes, i.name)
    ), manifest


def find_replaced_files(
    state: RemoteState,
    items: Sequence[UploadFile],
    manifest: UploadFile,
    where: str,
    overwrite: bool,
) -> tuple[str, ...]:
    """Return the files to remove from the remote before sending, the manifest first.

    Raises TransferError if another artifact or other files are there and `overwrite` is false.
    """
    same = (
        state.manifest is not None and hashlib.sha256(state.manifest).hexdigest() == manifest.sha256
    )
    if state.manifest is not None and not same and not overwrite:
        raise TransferError(
            f"{where}: expected no other artifact, found one; choose another address, or pass "
            "--overwrite"
        )
    named = parse_manifest_names(state.manifest) if state.manifest is not None else set[str]()
    unknown = [name for name in state.others if name not in named]
    if unknown and not overwrite:
        raise TransferError(
            f"{where}: expected an empty remote or this artifact, found {len(unknown)} other "
            f"files, the first {shorten_repr(unknown[0])}; choose another address, or pass "
            "--overwrite"
        )
    if same:  # a signature that the local copy lacks is kept
        return (MANIFEST,) if any(item.name not in state.present for item in items) else ()
    gone = (name for name in state.others if name in named)
    return (MANIFEST, *sorted(gone)) if state.manifest is not None else ()


def parse_manifest_names(manifest: bytes) -> set[str]:
    """Return the file names of a remote manifest; an empty set if it is invalid."""
    try:
        values = parse_json(manifest, MANIFEST, TransferError)
        files = {*parse_files(values, MANIFEST), *parse_unhashed(values), SIGNATURE, LOADTEST}
    except QuantkitError:
        return set()
    return set() if any(find_name_faults(files)) else files


def send_file(
    remote: Remote, item: UploadFile, progress: TransferProgress, patience: RetryPolicy
) -> None:
    """Send one file; retry as long as bytes arrive."""
    best = 0

    def report_bytes(n_bytes: int) -> None:
        nonlocal best
        best = max(best, n_bytes)
        progress.report_bytes(item.name, n_bytes)

    retry(
        lambda: remote.send(item, report_bytes),
        f"{remote.where}: {item.name}",
        patience,
        lambda: best,
        progress.stop,
    )
