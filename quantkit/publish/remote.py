"""Remotes to which artifacts are published: addresses, the Remote protocol, and errors.

    hf://owner/name, owner/name      remotes/hf.py      one commit makes everything visible
    oci://host[:port]/name[:tag]     remotes/oci.py     the tag is set last
    s3://bucket/prefix               remotes/s3.py      the artifact's manifest is written last
    file:///folder, folder           remotes/file.py    the same
    gs://, az://, ...                remotes/fsspec.py  the same, through fsspec

An interrupted publication has no manifest anywhere and is therefore not an artifact. Messages of
libraries reach the user through `describe_exception`, which removes credentials.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pkgutil
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantkit.errors import QuantkitError, TransferError, UsageError
from quantkit.io.files import expand_home, shorten_repr
from quantkit.io.retry import ResponseRefused, RetryPolicy, TransientError, retry
from quantkit.publish import remotes

PIECE_BYTES = 8 << 20
"""Bytes that are read, hashed and sent as one piece."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadFile:
    """A file to publish: `name` as in the manifest, `path` on this machine."""

    name: str
    path: Path
    n_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteState:
    """State of a remote before anything is sent.

    present: names of files that exist with equal hash; manifest: of the existing artifact, or None;
    others: files that belong neither to the new artifact nor to the remote itself.
    """

    present: frozenset[str] = frozenset()
    manifest: bytes | None = None
    others: tuple[str, ...] = ()


BytesCallback = Callable[[int], None]
"""Called with the bytes of a file that have arrived so far; may raise to stop the transfer."""


class Remote(Protocol):
    """An open remote. Calls raise TransientError if a retry may succeed, else QuantkitError."""

    where: str
    """Name in messages, without credentials."""

    def list_remote(self, items: Sequence[UploadFile], manifest: str) -> RemoteState:
        """Compare the remote with `items`; `manifest` is the name of the manifest, not among the
        items.
        """
        ...

    def begin_upload(self, gone: Sequence[str]) -> None:
        """Prepare the remote; from now on it holds no artifact. `gone`: files of the replaced
        artifact.
        """
        ...

    def send(self, item: UploadFile, report_bytes: BytesCallback) -> None:
        """Send a file; resumes an earlier attempt where the remote keeps partial uploads."""
        ...

    def finalize(self, items: Sequence[UploadFile], manifest: UploadFile) -> str:
        """Write the manifest last and return the location; `items` are all other files."""
        ...

    def fetch_manifest(self, name: str) -> bytes | None:
        """Return the manifest of the artifact, or None."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Return the bytes of every file by name; names are untrusted."""
        ...

    def read(self, name: str, first: int) -> Generator[bytes, None, None]:
        """Yield the bytes of a file from `first` on, in pieces."""
        ...

    def close(self) -> None:
        """Release connections and locks."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteOptions:
    """Options of an address: revision and private for the Hugging Face Hub; jobs: files in
    parallel.
    """

    writing: bool = False
    revision: str | None = None
    private: bool = False
    jobs: int = 4
    retry_policy: RetryPolicy = RetryPolicy()


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteScheme:
    """Opens addresses of one scheme: open(text after "scheme://", whole address, options)."""

    open: Callable[[str, str, RemoteOptions], Remote]
    package: str | None = None  # package that it imports beyond quantkit's dependencies
    extra: str | None = None  # extra of quantkit that installs it
    revisions: bool = False  # whether it supports --revision and --private


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ALIASES = {"s3a": "s3", "local": "file"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def open_remote(text: str, options: RemoteOptions) -> Remote:
    """Open the remote at an address; raises UsageError for an invalid address or a missing
    package.
    """
    scheme, rest = parse_address(text)
    names = {module.name for module in pkgutil.iter_modules(remotes.__path__)}
    file = scheme if scheme in names - {"fsspec"} else "fsspec"
    kind = importlib.import_module(f"{remotes.__name__}.{file}").REMOTE
    assert isinstance(kind, RemoteScheme)
    if (options.revision is not None or options.private) and not kind.revisions:
        flag = "--private" if options.revision is None else "--revision"
        raise UsageError(
            f"{flag}: expected a repository of the Hugging Face Hub, found "
            f"{remove_secrets(text)}; leave it out"
        )
    if kind.package and importlib.util.find_spec(kind.package) is None:
        raise UsageError(
            f"{scheme}:// needs the package {kind.package}, which is not installed; "
            f"pip install 'quantkit[{kind.extra}]', or choose another remote"
        )
    return retry(lambda: kind.open(rest, text, options), remove_secrets(text), options.retry_policy)


def parse_address(text: str) -> tuple[str, str]:
    """Return the scheme and the rest of a URL, a hub id or a folder; raises UsageError if
    ambiguous.
    """
    if not text or _CONTROL.search(text):
        raise UsageError(
            f"expected a URL, owner/name or a folder, found {shorten_repr(remove_secrets(text))}; "
            "check the address"
        )
    match = _SCHEME.fullmatch(text)
    if match:
        scheme, rest = match[1].lower(), match[2]
        authority = rest.partition("/")[0]
        if ":" in authority.rpartition("@")[0]:
            raise UsageError(
                f"{remove_secrets(text)}: expected no password in an address, found one; use the "
                "login of the service (`hf auth login`, AWS profiles, `docker login`)"
            )
        return _ALIASES.get(scheme, scheme), rest
    if "::" in text:
        raise UsageError(
            f"{remove_secrets(text)}: expected one URL, found a chain of them; name the remote "
            "itself"
        )
    if expand_home(text).exists() or not _HUB_ID.fullmatch(text):
        return "file", text
    if Path(text).parent.is_dir():
        raise UsageError(
            f"{text}: expected a folder or a repository of the Hugging Face Hub, and it could be "
            f"either; write ./{text} or hf://{text}"
        )
    return "hf", text


def check_received(content: bytes | bytearray, sha256: object) -> None:
    """Raise TransientError if the content does not match the remote's sha256; None if it has
    none.
    """
    if isinstance(sha256, str) and hashlib.sha256(content).hexdigest() != sha256:
        raise TransientError("received bytes differ from the sent ones")


# --------------------------------------------------------------------------- errors of libraries


_SECRETS = (
    (re.compile(r"(?<=://)[^\s/@]*@"), ""),  # user and password of a URL
    (re.compile(r"(\w+://[^\s?'\"<>]+)\?[^\s'\"<>]*"), r"\1"),  # its query, which may be signed
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ..."),
    (
        re.compile(
            r"(?i)\b(authorization|x-amz-[a-z-]*(?:token|signature|credential)|signature)(['\"]?[:=]\s*)\S+"
        ),
        r"\1\2...",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_..."),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), "..."),
)
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "HF_TOKEN")


def remove_secrets(text: str) -> str:
    """Remove passwords, tokens, signed queries and secrets of the environment from a text."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    for variable in _SECRET_VARIABLES:
        if len(value := os.environ.get(variable, "")) >= 8:
            text = text.replace(value, "...")
    return text


def describe_exception(fault: BaseException) -> str:
    """Format a library's exception as one short line without secrets."""
    text = " ".join(remove_secrets(str(fault)).split()) or type(fault).__name__
    return text if len(text) <= 240 else f"{text[:200]}...{text[-37:]}"


_TRANSIENT = frozenset({
    "httpx2",
    "httpcore2",
    "httpx",
    "httpcore",
    "requests",
    "urllib3",
    "aiohttp",
    "asyncio",
    "ssl",
})
_TRANSIENT_NAMES = frozenset({
    "HTTPClientError",
    "EndpointConnectionError",
    "ConnectionClosedError",
    "ReadTimeoutError",
    "ResponseStreamingError",
    "IncompleteRead",
    "IncompleteReadError",
    "ConnectTimeoutError",
    "FSTimeoutError",
    "ResponseParserError",
    "ProxyConnectionError",
    "ChecksumMismatch",
    "FlexibleChecksumError",
    "LocalProtocolError",
})


_TRANSIENT_CODES = frozenset({
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "InvalidDigest",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
    "500",
    "502",
    "503",
    "504",
})


def is_transient(fault: BaseException) -> bool:
    """Whether an exception means a failed connection or server; libraries share no base class."""
    kinds = type(fault).__mro__
    if isinstance(fault, ConnectionError | TimeoutError | EOFError) or any(
        kind.__module__.partition(".")[0] in _TRANSIENT or kind.__name__ in _TRANSIENT_NAMES
        for kind in kinds
    ):
        return True
    response = getattr(fault, "response", None)  # set by botocore; s3fs raises an OSError from it
    error = response.get("Error") if isinstance(response, dict) else None
    if isinstance(error, dict):
        return str(error.get("Code")) in _TRANSIENT_CODES
    return fault.__cause__ is not None and is_transient(fault.__cause__)


@contextmanager
def translate_errors(where: str) -> Iterator[None]:
    """Turn exceptions of libraries into TransientError or a TransferError with one sentence."""
    try:
        yield
    except (TransientError, QuantkitError):
        raise
    except PermissionError as fault:
        raise TransferError(
            f"{where}: expected access, found: {describe_exception(fault)}; check the credentials "
            "and their rights"
        ) from fault
    except FileNotFoundError as fault:
        raise TransferError(
            f"{where}: expected it to exist, found: {describe_exception(fault)}; create it first"
        ) from fault
    except ResponseRefused as fault:
        raise TransferError(f"{where}: {fault}; do not use this server") from fault
    except Exception as fault:
        if is_transient(fault):
            raise TransientError(f"{type(fault).__name__}: {describe_exception(fault)}") from fault
        raise TransferError(
            f"{where}: expected an answer, found {type(fault).__name__}: "
            f"{describe_exception(fault)}"
        ) from fault
