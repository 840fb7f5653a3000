"""The OCI distribution API, version 1.1, as far as blobs and manifests of artifacts need it.

Blobs are named by their sha256: what the registry has is not sent again, and what arrives otherwise is refused by the
registry. Redirected downloads lose the credentials (httpx2 drops them where the host changes).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2

from quantkit.errors import TransferError
from quantkit.io.files import shorten_repr
from quantkit.io.retry import RetryPolicy, TransientError, retry
from quantkit.publish.docker_login import find_login
from quantkit.publish.hashed_upload import HashedReader
from quantkit.publish.remote import BytesCallback, UploadFile, remove_secrets, translate_errors

Result = TypeVar("Result")

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_MANIFEST_LIMIT_BYTES = 4_000_000
_TIMEOUT = httpx2.Timeout(60.0)
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_ANEW = (b"DIGEST_INVALID", b"SIZE_INVALID", b"BLOB_UPLOAD_UNKNOWN", b"BLOB_UPLOAD_INVALID")
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class OciClient:
    """One repository of a registry; loopback hosts are spoken to over http, as docker does.

    Short requests are tried again here, files by whoever asks for them.
    """

    def __init__(
        self, host: str, repository: str, where: str, connections: int, patience: RetryPolicy
    ) -> None:
        self.where, self._patience = where, patience
        self._host = "registry-1.docker.io" if host == "docker.io" else host
        self._repository, self._login_host = repository, host
        self._scheme = "http" if _LOOPBACK.fullmatch(host) else "https"
        limits = httpx2.Limits(max_connections=2 * connections)
        self._client = httpx2.Client(
            timeout=_TIMEOUT, limits=limits, follow_redirects=False, trust_env=True
        )
        self._authorization: str | None = None
        self._uploads: dict[str, str] = {}  # sha256 -> where an upload that was begun goes on
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def has(self, digest: str) -> bool:
        """Whether a blob is there."""
        return (
            self._patiently(lambda: self._call("HEAD", f"blobs/{digest}", missing=True)) is not None
        )

    def manifest(self, reference: str) -> Mapping[str, object] | None:
        """The manifest under a tag or digest; None when there is none."""
        content = self._patiently(lambda: self._manifest(reference))
        if content is None:
            return None
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise TransferError(
                f"{self.where}: expected a manifest in JSON, found something else; check the tag"
            )
        return value

    def _manifest(self, reference: str) -> bytes | None:
        found = self._call(
            "GET", f"manifests/{reference}", missing=True, headers={"Accept": MANIFEST}
        )
        if found is None:
            return None
        if len(found.content) > _MANIFEST_LIMIT_BYTES:
            raise TransferError(
                f"{self.where}: expected a manifest, found {len(found.content)} bytes; check the tag"
            )
        told = (
            reference
            if reference.startswith("sha256:")
            else found.headers.get("Docker-Content-Digest")
        )
        if told not in {None, format_digest(found.content)}:
            raise TransientError("a manifest of another digest arrived")
        return found.content

    def set_tag(self, reference: str, manifest: bytes) -> str:
        """Store a manifest under a tag; its digest."""
        digest, headers = format_digest(manifest), {"Content-Type": MANIFEST}

        def store() -> None:
            found = self._call("PUT", f"manifests/{reference}", content=manifest, headers=headers)
            if found is not None and found.headers.get("Docker-Content-Digest", digest) != digest:
                raise TransientError("other bytes arrived than were sent")

        self._patiently(store)
        return digest

    def put(self, content: bytes) -> str:
        """Store a small blob; its digest."""
        digest, headers = format_digest(content), {"Content-Type": "application/octet-stream"}

        def store() -> None:
            self._call(
                "PUT", self._session(), params={"digest": digest}, content=content, headers=headers
            )

        if not self.has(digest):
            self._patiently(store)
        return digest

    def put_file(self, item: UploadFile, report_bytes: BytesCallback) -> None:
        """Store a file as a blob: one upload, gone on with after a cut where the registry kept what had arrived."""
        place, sent = self._begun(item)
        if sent < item.n_bytes:
            place = self._patch(place, item, sent, report_bytes)
        del self._uploads[item.sha256]  # whatever the registry says now, this upload is over
        self._call(
            "PUT",
            place,
            params={"digest": f"sha256:{item.sha256}"},
            headers={"Content-Length": "0"},
        )

    def _begun(self, item: UploadFile) -> tuple[str, int]:
        """Where the upload of a file goes on, and how many bytes of it are there."""
        place = self._uploads.pop(item.sha256, None)
        place, sent = self._standing(place) if place else ("", 0)
        if (
            not 1 < sent <= item.n_bytes
        ):  # an upload that has nothing yet is told like one that has a byte: 0-0
            place, sent = self._session(), 0
        self._uploads[item.sha256] = place
        return place, sent

    def blob(self, digest: str, first: int, name: str) -> Generator[bytes, None, None]:
        """The bytes of a file's blob from `first` on; a registry may ignore the range."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={first}-"} if first else {})
        with translate_errors(self.where), self._streamed(f"blobs/{digest}", headers) as answer:
            if answer.status_code == 404:
                raise TransferError(
                    f"{self.where}: {shorten_repr(name)}: expected its blob, found none; publish it again"
                )
            skip = first if answer.status_code == 200 else 0
            for piece in answer.iter_raw():
                if len(piece) > skip:
                    yield piece[skip:]
                skip = max(0, skip - len(piece))

    # ------------------------------------------------------------------------------------------------------ requests

    def _patiently(self, work: Callable[[], Result]) -> Result:
        return retry(work, self.where, self._patience)

    def _session(self) -> str:
        found = self._call("POST", "blobs/uploads/", headers={"Content-Length": "0"})
        return self._location(found)

    def _patch(self, place: str, item: UploadFile, first: int, report_bytes: BytesCallback) -> str:
        """Send a file from `first` on; where the upload goes on. The whole file is hashed on the way."""

        def body() -> Iterator[bytes]:
            with HashedReader(item) as pieces:
                for piece in pieces:
                    rest = piece[max(0, first - (pieces.sent - len(piece))) :]
                    if rest:
                        yield rest
                    report_bytes(pieces.sent)

        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(item.n_bytes - first),
            "Content-Range": f"{first}-{item.n_bytes - 1}",
        }
        return self._location(self._call("PATCH", place, content=body(), headers=headers))

    def _standing(self, place: str) -> tuple[str, int]:
        """Where a broken upload goes on, and how many bytes of it the registry has; 0 when it forgot it."""
        try:
            found = self._call("GET", place, missing=True)
        except TransferError:
            return place, 0
        match = (
            re.fullmatch(r"(?:bytes=)?0-(\d+)", found.headers.get("Range", "")) if found else None
        )
        return (self._location(found), int(match[1]) + 1) if match and found else (place, 0)

    def _location(self, answer: httpx2.Response | None) -> str:
        told = answer.headers.get("Location") if answer is not None else None
        if answer is None or not told:
            raise TransferError(
                f"{self.where}: expected the registry to name an upload, found none; try another one"
            )
        place = answer.url.join(told)
        if (place.scheme, place.netloc) != (answer.url.scheme, answer.url.netloc):
            raise TransferError(
                f"{self.where}: expected uploads to stay at the registry, found {shorten_repr(remove_secrets(str(place)))}; "
                "publish to that registry itself"
            )
        return str(place)

    def _url(self, path: str) -> str:
        if path.startswith(("http://", "https://")):
            return path
        return f"{self._scheme}://{self._host}/v2/{self._repository}/{path}"

    def _call(
        self, method: str, path: str, *, missing: bool = False, params: Mapping[str, str] | None = None,
        content: bytes | Iterator[bytes] | None = None, headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response | None:  # fmt: skip
        """One request, asked again with credentials when the registry wants some; None for 404 when it may miss."""
        with translate_errors(self.where):
            url = httpx2.URL(self._url(path))
            url = url.copy_merge_params(dict(params)) if params else url
            answer = self._client.request(
                method, url, content=content, headers=self._with_login(headers)
            )
            if answer.status_code == 401 and isinstance(content, bytes | None):
                self._authorize(answer)
                answer = self._client.request(
                    method, url, content=content, headers=self._with_login(headers)
                )
            return self._checked(answer, missing)

    @contextmanager
    def _streamed(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        url = self._url(path)
        for again in (True, False):
            request = self._client.build_request("GET", url, headers=self._with_login(headers))
            answer = self._client.send(request, stream=True, follow_redirects=True)
            try:
                if answer.status_code == 401 and again:
                    self._authorize(answer)
                    continue
                self._checked(answer, missing=True)
                yield answer
                return
            finally:
                answer.close()

    def _with_login(self, headers: Mapping[str, str] | None) -> dict[str, str]:
        return dict(headers or {}) | (
            {"Authorization": self._authorization} if self._authorization else {}
        )

    def _checked(self, answer: httpx2.Response, missing: bool) -> httpx2.Response | None:
        status = answer.status_code
        if status < 300:
            return answer
        if status == 404 and missing:
            return None
        if not answer.is_stream_consumed:
            answer.read()
        if status in _PASSING:
            raise TransientError(f"the registry answered {status}")
        if status in {401, 403}:
            raise TransferError(
                f"{self.where}: expected to be let in, found {status}; `docker login {self._login_host}` with a user "
                "who may do this"
            )
        lost = status == 416 and answer.request.method != "GET"
        if lost or any(code in answer.content for code in _ANEW):
            raise TransientError("the registry gave an upload up")
        text = shorten_repr(remove_secrets(answer.text), 160)
        raise TransferError(
            f"{self.where}: expected the registry to answer, found {status} ({text}); check the name"
        )

    # --------------------------------------------------------------------------------------------------------- login

    def _authorize(self, answer: httpx2.Response) -> None:
        """Answer a challenge: Basic, or a token of the realm it names; TransferError without a way in."""
        challenge = answer.headers.get("WWW-Authenticate", "")
        kind, _, rest = challenge.partition(" ")
        known = find_login(self._login_host)
        with self._lock:
            if kind.lower() == "basic" and known:
                self._authorization = "Basic " + base64.b64encode(":".join(known).encode()).decode()
            elif kind.lower() == "bearer":
                self._authorization = "Bearer " + self._token(dict(_CHALLENGE.findall(rest)), known)

    def _token(self, challenge: Mapping[str, str], known: tuple[str, str] | None) -> str:
        realm = challenge.get("realm", "")
        if urlsplit(realm).scheme != "https" and self._scheme == "https":
            raise TransferError(
                f"{self.where}: expected the registry to name a login over https, found {shorten_repr(remove_secrets(realm))}; "
                "credentials are not sent there"
            )
        asked = {key: challenge[key] for key in ("service", "scope") if challenge.get(key)}
        if known and known[0] == "<token>":
            form = {
                **asked,
                "grant_type": "refresh_token",
                "client_id": "quantkit",
                "refresh_token": known[1],
            }
            answer = self._client.post(realm, data=form)
        else:
            answer = self._client.get(realm, params=asked, auth=known)
        if answer.status_code in {400, 401, 403}:
            raise TransferError(
                f"{self.where}: expected the login to be known, found {answer.status_code}; "
                f"`docker login {self._login_host}`"
            )
        self._checked(answer, missing=False)
        found = json.loads(answer.content)
        token = found.get("token") or found.get("access_token") if isinstance(found, dict) else None
        if not isinstance(token, str):
            raise TransferError(
                f"{self.where}: expected a token from the registry's login, found none; try again"
            )
        return token


def format_digest(content: bytes) -> str:
    """A digest as registries write it."""
    return "sha256:" + hashlib.sha256(content).hexdigest()
