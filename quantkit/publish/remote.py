"""What a place is to which artifacts are published: its address, what can be asked of it, and how it fails.

    hf://owner/name, owner/name      remotes/hf.py      one commit makes everything visible
    oci://host[:port]/name[:tag]     remotes/oci.py     the tag is set last
    s3://bucket/prefix               remotes/s3.py      the artifact's manifest is written last
    file:///folder, folder           remotes/file.py    the same
    gs://, az://, ...                remotes/other.py   the same, through fsspec

Everywhere an interrupted publication has no manifest and so is recognizably none. Texts of libraries reach the user
through `told`, which removes credentials.
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
from quantkit.io.files import shorten_repr
from quantkit.io.retry import RetryPolicy, TransientError, retry
from quantkit.publish import remotes

PIECE_BYTES = 8 << 20
"""What is read, hashed and sent at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadFile:
    """A file of an artifact on its way out: `name` as in the manifest, `path` on this machine."""

    name: str
    path: Path
    n_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteState:
    """What lies at a place before anything is sent.

    there: names of items that are there with equal hash; manifest: of the artifact there, None for none;
    others: files that are no item, nor in the manifest found, and that are not the place's own furniture.
    """

    there: frozenset[str] = frozenset()
    manifest: bytes | None = None
    others: tuple[str, ...] = ()


BytesCallback = Callable[[int], None]
"""Is told how many bytes of a file have arrived so far; may raise to stop a transfer."""


class Remote(Protocol):
    """An open place. Calls raise Interrupted for what may work when tried again, else QuantkitError."""

    where: str
    """How it is called in messages, without credentials."""

    def list_remote(self, items: Sequence[UploadFile], manifest: str) -> RemoteState:
        """What is there already; `manifest` is the name of the artifact's manifest, which is no item."""
        ...

    def begin_upload(self, gone: Sequence[str]) -> None:
        """Get ready to send; from now on what is there is no artifact. `gone`: files of the one it replaces."""
        ...

    def send(self, item: UploadFile, report_bytes: BytesCallback) -> None:
        """Make the bytes of a file arrive; goes on with what an earlier try has left where the place keeps that."""
        ...

    def finalize(self, items: Sequence[UploadFile], manifest: UploadFile) -> str:
        """Make it an artifact, with the manifest as the last act; `items` are all of its files. Where it is now."""
        ...

    def fetch_manifest(self, name: str) -> bytes | None:
        """The manifest of the artifact there; None when there is none."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file there, by name; names may be anything."""
        ...

    def read(self, name: str, first: int) -> Generator[bytes, None, None]:
        """The bytes of a file from `first` on, in pieces."""
        ...

    def close(self) -> None:
        """Let go of connections and locks."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteOptions:
    """What the user says beside the address: revision and private for the Hugging Face Hub, jobs the files at once."""

    writing: bool = False
    revision: str | None = None
    private: bool = False
    jobs: int = 4
    retry_policy: RetryPolicy = RetryPolicy()


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteScheme:
    """Opens addresses of one scheme: open(the text behind "scheme://", the whole address, options)."""

    open: Callable[[str, str, RemoteOptions], Remote]
    package: str | None = None  # what it imports beyond quantkit's own dependencies
    extra: str | None = None  # and the extra of quantkit that brings it
    revisions: bool = False  # whether it knows --revision and --private


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ALIASES = {"s3a": "s3", "local": "file"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def open_remote(text: str, options: RemoteOptions) -> Remote:
    """The place at an address; UsageError for an address that is none or lacks its package."""
    scheme, rest = parse_address(text)
    names = {module.name for module in pkgutil.iter_modules(remotes.__path__)}
    file = scheme if scheme in names - {"other"} else "other"
    kind = importlib.import_module(f"{remotes.__name__}.{file}").REMOTE
    assert isinstance(kind, RemoteScheme)
    if (options.revision is not None or options.private) and not kind.revisions:
        flag = "--private" if options.revision is None else "--revision"
        raise UsageError(
            f"{flag}: expected a repository of the Hugging Face Hub, found {remove_secrets(text)}; leave it out"
        )
    if kind.package and importlib.util.find_spec(kind.package) is None:
        raise UsageError(
            f"{scheme}:// needs the package {kind.package}, which is not installed; "
            f"pip install 'quantkit[{kind.extra}]', or choose another place"
        )
    return retry(lambda: kind.open(rest, text, options), remove_secrets(text), options.retry_policy)


def parse_address(text: str) -> tuple[str, str]:
    """Scheme and what follows it: a URL, owner/name of the hub, or a folder; UsageError where that is not clear."""
    if not text or _CONTROL.search(text):
        raise UsageError(
            f"expected a URL, owner/name or a folder, found {shorten_repr(remove_secrets(text))}; check the address"
        )
    match = _SCHEME.fullmatch(text)
    if match:
        scheme, rest = match[1].lower(), match[2]
        authority = rest.partition("/")[0]
        if ":" in authority.rpartition("@")[0]:
            raise UsageError(
                f"{remove_secrets(text)}: expected no password in an address, found one; use the place's own login "
                "(`hf auth login`, AWS profiles, `docker login`)"
            )
        return _ALIASES.get(scheme, scheme), rest
    if "::" in text:
        raise UsageError(
            f"{remove_secrets(text)}: expected one URL, found a chain of them; name the place itself"
        )
    if Path(text).expanduser().exists() or not _HUB_ID.fullmatch(text):
        return "file", text
    if Path(text).parent.is_dir():
        raise UsageError(
            f"{text}: expected a folder or a repository of the Hugging Face Hub, and it could be either; "
            f"write ./{text} or hf://{text}"
        )
    return "hf", text


def check_received(content: bytes | bytearray, sha256: object) -> None:
    """Interrupted when what arrived is not what the place says it has; `sha256` is no text where it says nothing."""
    if isinstance(sha256, str) and hashlib.sha256(content).hexdigest() != sha256:
        raise TransientError("other bytes arrived than were sent")


# ------------------------------------------------------------------------------------------------ what libraries say


_SECRETS = (
    (re.compile(r"(?<=://)[^\s/@]*@"), ""),  # user and password of a URL
    (re.compile(r"(\w+://[^\s?'\"<>]+)\?[^\s'\"<>]*"), r"\1"),  # its query, which may be signed
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 ..."),
    (re.compile(r"(?i)\b(authorization|x-amz-[a-z-]*(?:token|signature|credential)|signature)(['\"]?[:=]\s*)\S+"),
     r"\1\2..."),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_..."),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), "..."),
)  # fmt: skip
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "HF_TOKEN")


def remove_secrets(text: str) -> str:
    """Text without passwords, tokens, signed queries, and what the environment holds as secrets."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    for variable in _SECRET_VARIABLES:
        if len(value := os.environ.get(variable, "")) >= 8:
            text = text.replace(value, "...")
    return text


def describe_exception(fault: BaseException) -> str:
    """What an exception of a library says, on one short line without secrets."""
    text = " ".join(remove_secrets(str(fault)).split()) or type(fault).__name__
    return text if len(text) <= 240 else f"{text[:200]}...{text[-37:]}"


_PASSING = frozenset({
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
_PASSING_NAMES = frozenset({
    "HTTPClientError", "EndpointConnectionError", "ConnectionClosedError", "ReadTimeoutError", "ResponseStreamingError",
    "IncompleteRead", "IncompleteReadError", "ConnectTimeoutError", "FSTimeoutError", "ResponseParserError",
    "ProxyConnectionError", "ChecksumMismatch", "FlexibleChecksumError", "LocalProtocolError",
})  # fmt: skip


_PASSING_CODES = frozenset({
    "BadDigest", "IncompleteBody", "InternalError", "InvalidDigest", "RequestTimeout", "ServiceUnavailable", "SlowDown",
    "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "500", "502", "503", "504",
})  # fmt: skip


def is_transient(fault: BaseException) -> bool:
    """Whether a library's exception says that a connection or a server failed; the libraries share no base class."""
    kinds = type(fault).__mro__
    if isinstance(fault, ConnectionError | TimeoutError | EOFError) or any(
        kind.__module__.partition(".")[0] in _PASSING or kind.__name__ in _PASSING_NAMES
        for kind in kinds
    ):
        return True
    response = getattr(fault, "response", None)  # botocore's; s3fs raises an OSError because of it
    error = response.get("Error") if isinstance(response, dict) else None
    if isinstance(error, dict):
        return str(error.get("Code")) in _PASSING_CODES
    return fault.__cause__ is not None and is_transient(fault.__cause__)


@contextmanager
def translate_errors(where: str) -> Iterator[None]:
    """Around calls of other people's libraries: whatever they raise becomes Interrupted or one sentence."""
    try:
        yield
    except (TransientError, QuantkitError):
        raise
    except PermissionError as fault:
        raise TransferError(
            f"{where}: expected to be allowed in, found: {describe_exception(fault)}; check the credentials and their rights"
        ) from fault
    except FileNotFoundError as fault:
        raise TransferError(
            f"{where}: expected it to be there, found: {describe_exception(fault)}; make it first"
        ) from fault
    except Exception as fault:
        if is_transient(fault):
            raise TransientError(f"{type(fault).__name__}: {describe_exception(fault)}") from fault
        raise TransferError(
            f"{where}: expected an answer, found {type(fault).__name__}: {describe_exception(fault)}"
        ) from fault
