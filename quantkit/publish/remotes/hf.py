"""A model repository of the Hugging Face Hub: `hf://owner/name`, or owner/name.

quantkit's own bounded client reads listings and files; huggingface_hub, which follows the pages of
a listing without end, only writes.

Large files are uploaded first and are not visible; one commit then makes the whole artifact
visible. Files that the hub has by hash are not sent again, also after an interruption. Token and
endpoint are those of huggingface_hub (`hf auth login`, HF_TOKEN, HF_ENDPOINT). Other files of the
repository (.gitattributes, licenses, images) stay.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

from quantkit.errors import TransferError, UsageError
from quantkit.io.bounded_http import ResponseLimits
from quantkit.io.files import JSON_LIMIT_BYTES, shorten_repr
from quantkit.io.hub_client import HubReader
from quantkit.io.retry import RetryPolicy, TransientError, retry
from quantkit.publish.hashed_upload import HashedReader
from quantkit.publish.remote import (
    BytesCallback,
    RemoteOptions,
    RemoteScheme,
    RemoteState,
    UploadFile,
    check_received,
    describe_exception,
    remove_secrets,
    translate_errors,
)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REPOSITORY_FILES = re.compile(
    r"\.git\w+|README\.md|(?i:licen[cs]e|notice)[^/]*|.*\.(?:png|jpe?g|gif|svg|webp)"
)
_COLLECTION = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+-[0-9a-f]{24}", re.ASCII)
_MAIN = "main"
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class HubRemote:
    """A repository at one revision: a branch to publish to; a branch, tag or commit to pull
    from.
    """

    def __init__(self, repository: str, options: RemoteOptions) -> None:
        self.where = f"hf://{repository}" + (f"@{options.revision}" if options.revision else "")
        self._api, self._repository = HfApi(), repository
        self._revision, self._private = options.revision or _MAIN, options.private
        self._writing = options.writing
        self._commit: str | None = None  # seen by `list_remote` or `sizes`
        self._exists = False
        self._sizes: dict[str, int] = {}  # of the last listing
        self._reader = HubReader(repository)
        self._sent: dict[str, CommitOperationAdd] = {}
        self._there: frozenset[str] = frozenset()
        self._gone: tuple[str, ...] = ()

    def list_remote(self, items: Sequence[UploadFile], manifest: str) -> RemoteState:
        """Compare files by the hub's hashes: sha256 of large files, git ids of small ones."""
        files = self._files()
        self._there = frozenset(
            item.name for item in items if is_same_content(item, files.get(item.name))
        )
        existing = self.fetch_manifest(manifest) if manifest in files else None
        ours = {manifest, *self._there}
        others = sorted(
            name for name in files if name not in ours and not _REPOSITORY_FILES.fullmatch(name)
        )
        return RemoteState(present=self._there, manifest=existing, others=tuple(others))

    def begin_upload(self, gone: Sequence[str]) -> None:
        """Create repository and branch; existing files stay until the commit."""
        self._gone = tuple(gone)
        with self._translate():
            if not self._exists:
                self._api.create_repo(self._repository, private=self._private, exist_ok=True)
            if self._commit is None and self._revision != _MAIN:
                self._api.create_branch(self._repository, branch=self._revision, exist_ok=True)

    def send(self, item: UploadFile, report_bytes: BytesCallback) -> None:
        """Upload a large file; small files are part of the commit."""
        operation = make_addition(item)
        with self._translate():
            self._api.preupload_lfs_files(
                self._repository,
                [operation],
                revision=self._revision,
                num_threads=1,
                free_memory=False,
            )
        self._sent[item.name] = operation
        report_bytes(item.n_bytes)

    def finalize(self, items: Sequence[UploadFile], manifest: UploadFile) -> str:
        """Commit on top of the commit that `list_remote` saw, and check the result."""
        every = (*items, manifest)
        seen, files = self._commit, self._files()
        if all(
            is_same_content(item, files.get(item.name)) for item in every
        ):  # an earlier attempt succeeded, but its response was lost
            return f"hf://{self._repository}@{self._commit}"
        new = [
            self._sent.get(item.name) or make_addition(item)
            for item in items
            if item.name not in self._there
        ]
        old = set(files) & set(self._gone) - {item.name for item in every}
        operations = [
            *new,
            make_addition(manifest),
            *(CommitOperationDelete(name) for name in sorted(old)),
        ]
        with self._translate(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it mistakes the samples' Parquet files for a data set
            done = self._api.create_commit(
                self._repository,
                operations,  # type: ignore[arg-type]  # a union
                commit_message=f"quantkit publish {manifest.sha256[:12]}",
                revision=self._revision,
                parent_commit=seen,
            )
        self._revision = done.oid
        files = self._files()
        lost = [item.name for item in every if not is_same_content(item, files.get(item.name))]
        if lost:
            raise TransferError(
                f"{self.where}: {shorten_repr(lost[0])}: expected the file that was committed, "
                "found another or none (does the repository's .gitignore name it?); publish again"
            )
        return f"hf://{self._repository}@{done.oid}"

    def fetch_manifest(self, name: str) -> bytes | None:
        """Return the manifest at the seen commit, or None."""
        entry = self._files().get(name)
        if self._commit is None and not self._writing:
            raise TransferError(
                f"{self.where}: expected this on the Hub, found nothing that this user may see"
            )
        if entry is None:
            return None
        if entry.size > JSON_LIMIT_BYTES:
            raise TransferError(
                f"{self.where}: {name}: expected at most {JSON_LIMIT_BYTES} bytes, found "
                f"{entry.size}"
            )
        content = b"".join(self.read(name, 0))
        if entry.lfs is not None:
            check_received(content, entry.lfs.sha256)
        elif compute_git_id([content], len(content)) != entry.blob_id:
            raise TransientError("received bytes differ from the sent ones")
        return content

    def sizes(self) -> Mapping[str, int]:
        """Return the files of one commit; later commits do not affect this pull."""
        return {name: file.size for name, file in self._files().items()}

    def read(self, name: str, first: int) -> Generator[bytes, None, None]:
        """Yield a file of that commit; a server may ignore the range."""
        limits = ResponseLimits(n_bytes=self._sizes.get(name, 0))
        byte_range = f"{first}-" if first else ""
        with (
            self._translate(name),
            self._reader.open_file(self._commit or "", name, limits, byte_range) as answer,
        ):
            skip = first if answer.status_code == 200 else 0
            for piece in answer.iter_raw():
                if len(piece) > skip:
                    yield piece[skip:]
                skip = max(0, skip - len(piece))

    def close(self) -> None:
        """Close the connections; huggingface_hub keeps its own for the whole process."""
        self._reader.close()

    def _files(self) -> dict[str, RepoFile]:
        """Return the files of the revision and remember its commit; empty if it does not
        exist yet.
        """
        with self._translate():
            try:
                self._commit = self._reader.fetch_commit(self._revision)
                self._exists = True
                if not self._writing and self._commit:
                    self._revision = self._commit
                files = (
                    {entry.path: entry for entry in self._reader.list_files(self._commit)}
                    if self._commit
                    else {}
                )
                self._sizes = {name: entry.size for name, entry in files.items()}
                return files
            except GatedRepoError:
                raise
            except RevisionNotFoundError:
                self._exists, self._commit = True, None
            except RepositoryNotFoundError:
                self._exists, self._commit = False, None
        return {}

    def _translate(self, name: str = "") -> AbstractContextManager[None]:
        """Turn the hub's errors into one sentence each."""
        return translate_hub_errors(f"{self.where}: {shorten_repr(name)}" if name else self.where)


@contextmanager
def translate_hub_errors(where: str) -> Iterator[None]:
    """Turn the hub's errors into one sentence each."""
    with translate_errors(where):
        try:
            yield
        except OfflineModeIsEnabled as fault:
            raise TransferError(
                "HF_HUB_OFFLINE: expected the Hub to be used, found offline mode"
            ) from fault
        except GatedRepoError as fault:
            raise TransferError(
                f"{where}: expected access to this model, found a gate; accept its license on "
                "the Hub"
            ) from fault
        except (HfHubHTTPError, RuntimeError) as fault:
            raise translate_http_error(where, fault) from fault
        except HFValidationError as fault:
            raise UsageError(
                f"{where}: expected a repository and a revision, found: {describe_exception(fault)}"
            ) from fault


def translate_http_error(where: str, fault: Exception) -> Exception:
    """Translate an HTTP error by its status; for uploads it is the cause of a RuntimeError."""
    inner: BaseException = fault
    while inner.__cause__ is not None and not isinstance(inner, HfHubHTTPError):
        inner = inner.__cause__
    status = inner.response.status_code if isinstance(inner, HfHubHTTPError) else None
    if status is None or status in _TRANSIENT or (status == 400 and "BadDigest" in str(inner)):
        return TransientError(describe_exception(inner))
    if status in {401, 403}:
        return TransferError(
            f"{where}: expected access, found {status}; `hf auth login` with a token that has "
            "this permission"
        )
    if status == 404:
        return TransferError(
            f"{where}: expected this on the Hub, found nothing that this user may see"
        )
    if status in {409, 412}:
        return TransferError(
            f"{where}: expected the repository as it was at the start, found a newer commit; "
            "publish again"
        )
    return TransferError(f"{where}: expected success, found {status}: {describe_exception(inner)}")


def make_addition(item: UploadFile) -> CommitOperationAdd:
    """Check a file's hash and make its commit operation."""
    with HashedReader(item) as pieces:
        for _ in pieces:
            pass
    operation = CommitOperationAdd(path_in_repo=item.name, path_or_fileobj=str(item.path))
    operation.upload_info.sha256 = bytes.fromhex(item.sha256)
    return operation


def is_same_content(item: UploadFile, file: RepoFile | None) -> bool:
    """Whether the hub has this content: LFS files compare by sha256, others by git blob id."""
    if file is None or file.size != item.n_bytes:
        return False
    if file.lfs is not None:
        return file.lfs.sha256 == item.sha256
    with HashedReader(item) as pieces:
        return compute_git_id(pieces, item.n_bytes) == file.blob_id


def compute_git_id(pieces: Iterable[bytes], n_bytes: int) -> str:
    """Return the git blob id of a content."""
    digest = hashlib.sha1(f"blob {n_bytes}\0".encode(), usedforsecurity=False)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def check_collection(address: str, collection: str) -> str:
    """Return the repository of an address that can be in a collection of the Hub.

    address: hf://owner/name, or owner/name; collection: the end of its address on the Hub,
    "owner/title-0123456789abcdef01234567". Raises UsageError for others.
    """
    repository = address.removeprefix("hf://")
    if not _ID.fullmatch(repository):
        raise UsageError(
            "--collection: expected a model of the Hub as destination, hf://owner/name, found "
            f"{remove_secrets(address)}"
        )
    if not _COLLECTION.fullmatch(collection):
        raise UsageError(
            "--collection: expected the end of a collection's address on the Hub, such as "
            f"owner/title-0123456789abcdef01234567, found {shorten_repr(collection)}"
        )
    return repository


def add_to_collection(address: str, collection: str, policy: RetryPolicy) -> None:
    """Add a published model to a collection of the Hub; one that is in it stays there.

    Raises UsageError as `check_collection`, TransferError if the Hub refuses.
    """
    repository, where = check_collection(address, collection), f"collection {collection}"

    def add() -> None:
        with translate_hub_errors(where):
            HfApi().add_collection_item(collection, repository, "model", exists_ok=True)

    retry(add, where, policy)


def open_hub(rest: str, text: str, options: RemoteOptions) -> HubRemote:
    """Open the repository of an address."""
    if not _ID.fullmatch(rest):
        raise UsageError(
            f"{remove_secrets(text)}: expected hf://owner/name, found something else; --revision "
            "names a branch"
        )
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its warnings contain signed URLs
    return HubRemote(rest, options)


REMOTE = RemoteScheme(open=open_hub, revisions=True)
