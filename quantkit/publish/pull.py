"""Pull an artifact: check its manifest, fetch the files into a staging folder, verify, then rename.

Nothing unverified ever has the final name. An interrupted pull resumes with the files that are
complete by hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from quantkit.artifact.layout import (
    LOADTEST,
    MANIFEST,
    SCHEMA_VERSION,
    SIGNATURE,
    find_layout_faults,
)
from quantkit.artifact.replace import check_replaceable
from quantkit.errors import ArtifactError, TransferError, UsageError
from quantkit.io.files import (
    JSON_LIMIT_BYTES,
    expand_home,
    get_free_bytes,
    parse_json,
    shorten_repr,
)
from quantkit.io.retry import RetryPolicy, TransientError, retry
from quantkit.progress import ProgressCallback
from quantkit.publish.remote import Remote, RemoteOptions, open_remote
from quantkit.publish.staging_dir import (
    ExistingFiles,
    ExpectedFile,
    StagingDir,
    open_staging_dir,
    read_existing_manifest,
)
from quantkit.publish.transfer import (
    Transfer,
    TransferProgress,
    check_file_names,
    format_bytes,
    note_resume,
    parse_files,
    parse_unhashed,
    run_in_parallel,
)
from quantkit.verify.shallow import verify_artifact

MIN_PROGRESS_BYTES = 4096
"""Bytes between two failures that count as progress: a server that sends a byte per connection is
given up after `RetryPolicy.tries`, a link that breaks off often is not.
"""


def pull_artifact(
    src: str,
    path: Path,
    options: RemoteOptions,
    on_progress: ProgressCallback,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Transfer:
    """Fetch an artifact into the folder `path`, which exists afterwards only if it verifies.

    Raises TransferError if the remote has no complete artifact or sends other bytes, UsageError if
    something else is at `path`.
    """
    path = expand_home(path).absolute()
    with note_resume(), closing(open_remote(src, options)) as remote:
        content = retry(lambda: remote.fetch_manifest(MANIFEST), remote.where, options.retry_policy)
        if content is None:
            raise TransferError(
                f"{remote.where}: no {MANIFEST}: not an artifact of quantkit, or its publication "
                "did not finish; publish it again"
            )
        expected, status = list_expected_files(remote, content, options.retry_policy)
        total = sum(entry.n_bytes for entry in expected) + len(content)
        done = Transfer(
            location=remote.where,
            status=status,
            files=(*(entry.name for entry in expected), MANIFEST),
            n_bytes=total,
            n_present=0,
            present_bytes=0,
            manifest=hashlib.sha256(content).hexdigest(),
        )
        unchanged = replace(
            done, files=(), n_bytes=0, n_present=len(done.files), present_bytes=total
        )
        if is_present(path, content, overwrite):
            return unchanged
        if dry_run:
            return done
        with open_staging_dir(path) as staging:
            if is_present(path, content, overwrite):  # another pull finished first
                return unchanged
            existing = fetch_files(remote, staging, expected, options, on_progress)
            staging.put(MANIFEST, content)
            verify_received(staging, remote.where)
            staging.rename_into_place()
    new = tuple(name for name in done.files if name not in existing.complete)
    before = sum(existing.n_bytes.values())
    return replace(
        done,
        files=new,
        n_bytes=total - before,
        n_present=len(existing.complete),
        present_bytes=before,
    )


def verify_received(staging: StagingDir, where: str) -> None:
    """Verify the staging folder; raises TransferError if the files do not match the manifest."""
    try:
        verify_artifact(staging.folder)
    except ArtifactError as fault:
        raise TransferError(
            f"{where}: the files that arrived do not match the manifest; they are in "
            f"{staging.folder}: {fault}"
        ) from fault


def list_expected_files(
    remote: Remote, content: bytes, patience: RetryPolicy
) -> tuple[list[ExpectedFile], str]:
    """Return the files to fetch, largest first, and the artifact's status.

    Raises TransferError if the manifest is invalid or the remote lacks a file that it names.
    """
    where = remote.where
    values = parse_json(content, f"{where}: {MANIFEST}", TransferError)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise TransferError(
            f"{where}: {MANIFEST}: schema_version: expected {SCHEMA_VERSION}, found "
            f"{shorten_repr(values.get('schema_version'))}; use the quantkit that made it"
        )
    files = parse_files(values, where)
    free = [*parse_unhashed(values), SIGNATURE, LOADTEST]
    check_file_names([*files, *(name for name in free if name not in files), MANIFEST], where)
    if fault := next(find_layout_faults([*files, MANIFEST]), None):
        raise TransferError(
            f"{where}: {MANIFEST}: expected the files of an artifact, found {fault}; do not use it"
        )
    present = retry(remote.sizes, where, patience)
    faults = [
        f"{name}: expected {entry.n_bytes} bytes, found {present.get(name, 'no file')}"
        for name, entry in files.items()
        if present.get(name) != entry.n_bytes
    ]
    if faults:
        raise TransferError(
            f"{where}: expected the {len(files)} files that its manifest names, found "
            f"{len(faults)} missing or changed, the first {faults[0]}; publish it again"
        )
    extra = {
        name: ExpectedFile(name=name, n_bytes=present[name], sha256=None)
        for name in free
        if name in present and name not in files and present[name] <= JSON_LIMIT_BYTES
    }
    status = values.get("status")
    return sorted(
        [*files.values(), *extra.values()], key=lambda e: (-e.n_bytes, e.name)
    ), shorten_repr(status).strip("'")


def is_present(path: Path, manifest: bytes, overwrite: bool) -> bool:
    """Whether the artifact is already at `path`.

    Raises UsageError if something else is there and may not be replaced.
    """
    existing = read_existing_manifest(path, MANIFEST)
    if existing is None:
        return False
    if existing == manifest:
        try:
            verify_artifact(path)
            return True
        except ArtifactError as fault:
            if not overwrite:
                raise UsageError(
                    f"{path}: contains this artifact, but it was changed; --overwrite replaces "
                    f"it: {fault}"
                ) from fault
    if not overwrite:
        raise UsageError(f"{path}: exists already; choose another folder or pass --overwrite")
    if not existing:
        raise UsageError(
            f"{path}: exists and is not an artifact of quantkit; --overwrite replaces artifacts "
            "only"
        )
    check_replaceable(path)
    return False


def fetch_files(
    remote: Remote,
    staging: StagingDir,
    expected: Sequence[ExpectedFile],
    options: RemoteOptions,
    on_progress: ProgressCallback,
) -> ExistingFiles:
    """Fetch every file that is not complete; return the files that existed before."""
    existing = staging.prepare(expected)
    new = [entry for entry in expected if entry.name not in existing.complete]
    missing = sum(entry.n_bytes - existing.n_bytes.get(entry.name, 0) for entry in new)
    if missing > (room := get_free_bytes(staging.folder)):
        raise TransferError(
            f"{staging.folder}: expected free space for {format_bytes(missing)}, found "
            f"{format_bytes(room)}; free some space or choose another folder"
        )
    progress = TransferProgress("pull", sum(entry.n_bytes for entry in new), on_progress)
    run_in_parallel(
        new,
        lambda entry: fetch_file(remote, staging, entry, progress, options.retry_policy),
        options.jobs,
        progress.stop,
    )
    return existing


def fetch_file(
    remote: Remote,
    staging: StagingDir,
    expected: ExpectedFile,
    progress: TransferProgress,
    patience: RetryPolicy,
) -> None:
    """Fetch the rest of one file; fetch it again from the start if its hash is wrong."""
    with closing(staging.open_download(expected)) as file:

        def fetch_rest() -> None:
            if file.n_bytes < expected.n_bytes:
                with closing(remote.read(expected.name, file.n_bytes)) as pieces:
                    for piece in pieces:
                        file.write(piece)
                        progress.report_bytes(expected.name, file.n_bytes)
                        if file.n_bytes > expected.n_bytes:
                            return
            if file.n_bytes < expected.n_bytes:
                raise TransientError(f"{expected.n_bytes - file.n_bytes} bytes are missing")

        where = f"{remote.where}: {expected.name}"
        for _ in range(2):
            retry(
                fetch_rest,
                where,
                patience,
                lambda: file.n_bytes // MIN_PROGRESS_BYTES,
                progress.stop,
            )
            if file.finish():
                return
            file.restart()
        raise TransferError(
            f"{where}: expected the file that its manifest names (sha256 {expected.sha256}), found "
            "another, twice; it was changed after publication or is damaged: publish it again"
        )
