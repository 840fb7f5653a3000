"""Pulling an artifact: its manifest, every name in it checked, the files beside the folder, verified, then renamed.

Nothing unverified ever has the final name. What an interrupted pull left is gone on with, by hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from quantkit.artifact.layout import LOADTEST, MANIFEST, SCHEMA_VERSION, SIGNATURE
from quantkit.errors import ArtifactError, TransferError, UsageError
from quantkit.io.files import JSON_LIMIT_BYTES, get_free_bytes, parse_json, shorten_repr
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


def pull_artifact(
    src: str,
    path: Path,
    options: RemoteOptions,
    tell: ProgressCallback,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Transfer:
    """Fetch an artifact into a folder, which is there with verified content or not at all.

    TransferError when the place has no whole artifact or sends other bytes; UsageError when `path` is taken.
    """
    path = path.expanduser().absolute()
    with note_resume(), closing(open_remote(src, options)) as remote:
        content = retry(lambda: remote.fetch_manifest(MANIFEST), remote.where, options.retry_policy)
        if content is None:
            raise TransferError(
                f"{remote.where}: no {MANIFEST}: not an artifact of quantkit, or its publication did not finish; "
                "publish it again"
            )
        wanted, status = list_expected_files(remote, content, options.retry_policy)
        total = sum(entry.n_bytes for entry in wanted) + len(content)
        done = Transfer(
            place=remote.where, status=status, files=(*(entry.name for entry in wanted), MANIFEST), n_bytes=total,
            there=0, there_bytes=0, manifest=hashlib.sha256(content).hexdigest(),
        )  # fmt: skip
        as_it_is = replace(done, files=(), n_bytes=0, there=len(done.files), there_bytes=total)
        if is_present(path, content, overwrite):
            return as_it_is
        if dry_run:
            return done
        with open_staging_dir(path) as place:
            if is_present(path, content, overwrite):  # another pull was faster
                return as_it_is
            there = fetch_files(remote, place, wanted, options, tell)
            place.put(MANIFEST, content)
            try:
                verify_artifact(place.folder)
            except ArtifactError as fault:
                raise TransferError(
                    f"{remote.where}: what arrived is not what its manifest says; it lies in {place.folder}: {fault}"
                ) from fault
            place.rename_into_place()
    new, before = (
        tuple(name for name in done.files if name not in there.whole),
        sum(there.n_bytes.values()),
    )
    return replace(
        done, files=new, n_bytes=total - before, there=len(there.whole), there_bytes=before
    )


def list_expected_files(
    remote: Remote, content: bytes, patience: RetryPolicy
) -> tuple[list[ExpectedFile], str]:
    """What a manifest says there is to fetch, the largest first, and its status; checked against what lies there."""
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
    present = retry(remote.sizes, where, patience)
    faults = [
        f"{name}: expected {entry.n_bytes} bytes, found {present.get(name, 'no file')}"
        for name, entry in files.items()
        if present.get(name) != entry.n_bytes
    ]
    if faults:
        raise TransferError(
            f"{where}: expected the {len(files)} files that its manifest names, found {len(faults)} missing or "
            f"changed, the first {faults[0]}; publish it again"
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
    """Whether the artifact is at `path` already; UsageError when something else is that must not be replaced."""
    found = read_existing_manifest(path, MANIFEST)
    if found is None:
        return False
    if found == manifest:
        try:
            verify_artifact(path)
            return True
        except ArtifactError as fault:
            if not overwrite:
                raise UsageError(
                    f"{path}: this artifact is there already and was changed; --overwrite replaces it: {fault}"
                ) from fault
    if not overwrite:
        raise UsageError(f"{path}: exists already; choose another folder or pass --overwrite")
    if not found:
        raise UsageError(
            f"{path}: exists and is not an artifact of quantkit; --overwrite replaces artifacts only"
        )
    return False


def fetch_files(
    remote: Remote,
    place: StagingDir,
    wanted: Sequence[ExpectedFile],
    options: RemoteOptions,
    tell: ProgressCallback,
) -> ExistingFiles:
    """Every file that is not whole yet; what was there before."""
    there = place.prepare(wanted)
    new = [entry for entry in wanted if entry.name not in there.whole]
    missing = sum(entry.n_bytes - there.n_bytes.get(entry.name, 0) for entry in new)
    if missing > (room := get_free_bytes(place.folder)):
        raise TransferError(
            f"{place.folder}: expected room for {format_bytes(missing)}, found {format_bytes(room)}; free some space or choose another "
            "folder"
        )
    tally = TransferProgress("pull", sum(entry.n_bytes for entry in new), tell)
    run_in_parallel(
        new,
        lambda entry: fetch_file(remote, place, entry, tally, options.retry_policy),
        options.jobs,
        tally.stop,
    )
    return there


def fetch_file(
    remote: Remote,
    place: StagingDir,
    wanted: ExpectedFile,
    tally: TransferProgress,
    patience: RetryPolicy,
) -> None:
    """One file behind what is there of it; once more from its start when it is not what the manifest says."""
    with closing(place.open_download(wanted)) as file:

        def rest() -> None:
            if file.have < wanted.n_bytes:
                with closing(remote.read(wanted.name, file.have)) as pieces:
                    for piece in pieces:
                        file.write(piece)
                        tally.report_bytes(wanted.name, file.have)
                        if file.have > wanted.n_bytes:
                            return
            if file.have < wanted.n_bytes:
                raise TransientError(f"{wanted.n_bytes - file.have} bytes are missing")

        where = f"{remote.where}: {wanted.name}"
        for _ in range(2):
            retry(rest, where, patience, lambda: file.have, tally.stop)
            if file.finish():
                return
            file.forget()
        raise TransferError(
            f"{where}: expected the file that its manifest names (sha256 {wanted.sha256}), found another, twice; it "
            "was changed after it was published, or is damaged: publish it again"
        )
