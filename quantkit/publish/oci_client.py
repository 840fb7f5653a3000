"""Client for the OCI distribution API 1.1: blobs and manifests of artifacts.

Blobs are named by their sha256: existing blobs are not sent again, and the registry refuses other
bytes. Redirected downloads do not carry the credentials (httpx2 drops them if the host changes) and
lead to public hosts only. Every answer is bounded (`io.bounded_http`).
oras-py is not used: 0.2.43 does not resume, does not check digests of downloads, and reads whole
files into memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import httpx2

from quantkit.errors import TransferError
from quantkit.io.bounded_http import (
    HEAD_SECONDS,
    IDENTITY,
    LIMITS_KEY,
    SMALL_ANSWER,
    ResponseLimits,
    bound_response,
    call_with_deadline,
)
from quantkit.io.files import shorten_repr
from quantkit.io.public_hosts import is_public_host
from quantkit.io.retry import RetryPolicy, TransientError, retry
from quantkit.publish.docker_login import Login, find_login
from quantkit.publish.hashed_upload import HashedReader
from quantkit.publish.oci_auth import check_realm, parse_challenge, parse_token
from quantkit.publish.remote import BytesCallback, UploadFile, remove_secrets, translate_errors

Result = TypeVar("Result")

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_TIMEOUT = httpx2.Timeout(60.0)
_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_RESTART_CODES = (
    b"DIGEST_INVALID",
    b"SIZE_INVALID",
    b"BLOB_UPLOAD_UNKNOWN",
    b"BLOB_UPLOAD_INVALID",
)
_ANSWER_SECONDS = HEAD_SECONDS + (SMALL_ANSWER.seconds or 0.0)
"""Time of a short request with its answer."""
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class OciClient:
    """One repository of a registry; loopback hosts use http, as in docker.

    The client retries short requests; callers retry transfers of files.
    """

    def __init__(
        self, host: str, repository: str, where: str, connections: int, retry_policy: RetryPolicy
    ) -> None:
        self.where, self._retry_policy = where, retry_policy
        self._host = "registry-1.docker.io" if host == "docker.io" else host
        self._repository, self._login_host = repository, host
        self._scheme = "http" if _LOOPBACK.fullmatch(host) else "https"
        limits = httpx2.Limits(max_connections=2 * connections)
        self._client = httpx2.Client(
            timeout=_TIMEOUT,
            limits=limits,
            follow_redirects=False,
            trust_env=True,
            headers=IDENTITY,
            event_hooks={"request": [self._check_target], "response": [bound_response]},
        )
        self._realm: str | None = None  # host of the checked realm
        self._authorization: str | None = None
        self._uploads: dict[str, str] = {}  # sha256 -> URL of an unfinished upload
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def has(self, digest: str) -> bool:
        """Whether a blob exists."""
        return self._retry(lambda: self._call("HEAD", f"blobs/{digest}", missing=True)) is not None

    def manifest(self, reference: str) -> Mapping[str, object] | None:
        """Return the manifest under a tag or digest, or None."""
        content = self._retry(lambda: self._manifest(reference))
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
        response = self._call(
            "GET", f"manifests/{reference}", missing=True, headers={"Accept": MANIFEST}
        )
        if response is None:
            return None
        digest = (
            reference
            if reference.startswith("sha256:")
            else response.headers.get("Docker-Content-Digest")
        )
        if digest not in {None, format_digest(response.content)}:
            raise TransientError("received a manifest with another digest")
        return response.content

    def set_tag(self, reference: str, manifest: bytes) -> str:
        """Store a manifest under a tag; return its digest."""
        digest, headers = format_digest(manifest), {"Content-Type": MANIFEST}

        def store() -> None:
            response = self._call(
                "PUT", f"manifests/{reference}", content=manifest, headers=headers
            )
            if (
                response is not None
                and response.headers.get("Docker-Content-Digest", digest) != digest
            ):
                raise TransientError("received bytes differ from the sent ones")

        self._retry(store)
        return digest

    def put(self, content: bytes) -> str:
        """Store a small blob; return its digest."""
        digest, headers = format_digest(content), {"Content-Type": "application/octet-stream"}

        def store() -> None:
            self._call(
                "PUT", self._session(), params={"digest": digest}, content=content, headers=headers
            )

        if not self.has(digest):
            self._retry(store)
        return digest

    def put_file(self, item: UploadFile, report_bytes: BytesCallback) -> None:
        """Store a file as a blob in one upload; resumes it if the registry kept the received
        bytes.
        """
        place, sent = self._resume_upload(item)
        if sent < item.n_bytes:
            place = self._patch(place, item, sent, report_bytes)
        del self._uploads[item.sha256]  # this upload ends here, whatever the response
        self._call(
            "PUT",
            place,
            params={"digest": f"sha256:{item.sha256}"},
            headers={"Content-Length": "0"},
        )

    def _resume_upload(self, item: UploadFile) -> tuple[str, int]:
        """Return the URL of a file's upload and the bytes that the registry has."""
        place = self._uploads.pop(item.sha256, None)
        place, sent = self._query_upload(place) if place else ("", 0)
        if (
            not 1 < sent <= item.n_bytes
        ):  # registries report an empty upload like one of a single byte: 0-0
            place, sent = self._session(), 0
        self._uploads[item.sha256] = place
        return place, sent

    def blob(self, digest: str, size: int, first: int, name: str) -> Generator[bytes, None, None]:
        """Yield the bytes of a blob of `size` bytes from `first` on; a registry may ignore the
        range.
        """
        headers = {"Range": f"bytes={first}-"} if first else {}
        limits = ResponseLimits(n_bytes=size)
        path, where = f"blobs/{digest}", f"{self.where}: {shorten_repr(name)}"
        with translate_errors(where), self._stream(path, headers, limits) as answer:
            if answer.status_code == 404:
                raise TransferError(f"{where}: expected its blob, found none; publish it again")
            skip = first if answer.status_code == 200 else 0
            for piece in answer.iter_raw():
                if len(piece) > skip:
                    yield piece[skip:]
                skip = max(0, skip - len(piece))

    # -------------------------------------------------------------------------------- requests

    def _retry(self, work: Callable[[], Result]) -> Result:
        return retry(work, self.where, self._retry_policy)

    def _session(self) -> str:
        response = self._call("POST", "blobs/uploads/", headers={"Content-Length": "0"})
        return self._location(response)

    def _patch(self, place: str, item: UploadFile, first: int, report_bytes: BytesCallback) -> str:
        """Send a file from `first` on and hash all of it; return the URL of the upload."""

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

    def _query_upload(self, place: str) -> tuple[str, int]:
        """Return the URL of an interrupted upload and its bytes; 0 if the registry dropped it."""
        try:
            response = self._call("GET", place, missing=True)
        except TransferError:
            return place, 0
        match = (
            re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", ""))
            if response
            else None
        )
        return (self._location(response), int(match[1]) + 1) if match and response else (place, 0)

    def _location(self, answer: httpx2.Response | None) -> str:
        location = answer.headers.get("Location") if answer is not None else None
        if answer is None or not location:
            raise TransferError(
                f"{self.where}: expected the registry to name an upload, found none; try another "
                "one"
            )
        place = answer.url.join(location)
        if (place.scheme, place.netloc) != (answer.url.scheme, answer.url.netloc):
            raise TransferError(
                f"{self.where}: expected uploads to stay at the registry, found "
                f"{shorten_repr(remove_secrets(str(place)))}; publish to that registry itself"
            )
        return str(place)

    def _url(self, path: str) -> str:
        if path.startswith(("http://", "https://")):
            return path
        return f"{self._scheme}://{self._host}/v2/{self._repository}/{path}"

    def _call(
        self,
        method: str,
        path: str,
        *,
        missing: bool = False,
        params: Mapping[str, str] | None = None,
        content: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response | None:
        """Send a request, with credentials if the registry requires them; None for 404 if
        `missing`.
        """
        with translate_errors(self.where):
            url = httpx2.URL(self._url(path))
            url = url.copy_merge_params(dict(params)) if params else url
            is_file = not isinstance(content, bytes | None)  # its upload may take hours

            def send() -> httpx2.Response:
                return self._client.request(
                    method, url, content=content, headers=self._with_login(headers)
                )

            answer = send() if is_file else call_with_deadline(send, _ANSWER_SECONDS)
            if answer.status_code == 401 and not is_file:
                self._authorize(answer)
                answer = call_with_deadline(send, _ANSWER_SECONDS)
            return self._check(answer, missing)

    @contextmanager
    def _stream(
        self, path: str, headers: Mapping[str, str], limits: ResponseLimits
    ) -> Iterator[httpx2.Response]:
        url = self._url(path)
        for again in (True, False):
            request = self._client.build_request(
                "GET", url, headers=self._with_login(headers), extensions={LIMITS_KEY: limits}
            )
            send = partial(self._client.send, request, stream=True, follow_redirects=True)
            answer = call_with_deadline(send, _ANSWER_SECONDS)
            try:
                if answer.status_code == 401 and again:
                    self._authorize(answer)
                    continue
                self._check(answer, missing=True)
                yield answer
                return
            finally:
                answer.close()

    def _check_target(self, request: httpx2.Request) -> None:
        """Check the target of a request, redirected ones too; raises TransferError."""
        url, own = request.url, httpx2.URL(f"{self._scheme}://{self._host}")
        if url.host in {own.host, self._realm} and url.scheme in {"https", self._scheme}:
            return
        if url.scheme != "https" or not is_public_host(url.host):
            raise TransferError(
                f"{self.where}: expected downloads from public hosts over https, found a redirect "
                f"to {shorten_repr(remove_secrets(f'{url.scheme}://{url.host}'))}; do not use it"
            )

    def _with_login(self, headers: Mapping[str, str] | None) -> dict[str, str]:
        return dict(headers or {}) | (
            {"Authorization": self._authorization} if self._authorization else {}
        )

    def _check(self, answer: httpx2.Response, missing: bool) -> httpx2.Response | None:
        status = answer.status_code
        if status < 300:
            return answer
        if status == 404 and missing:
            return None
        if not answer.is_stream_consumed:
            answer.read()
        if status in _TRANSIENT:
            raise TransientError(f"the registry answered {status}")
        if status in {401, 403}:
            raise TransferError(
                f"{self.where}: expected access, found {status}; `docker login {self._login_host}` "
                "with a user that has this permission"
            )
        lost = status == 416 and answer.request.method != "GET"
        if lost or any(code in answer.content for code in _RESTART_CODES):
            raise TransientError("the registry dropped an upload")
        text = shorten_repr(remove_secrets(answer.text), 160)
        raise TransferError(
            f"{self.where}: expected an answer, found {status} ({text}); check the name"
        )

    # ----------------------------------------------------------------------------------- login

    def _authorize(self, answer: httpx2.Response) -> None:
        """Answer a challenge: Basic, or a token of its realm; raises TransferError if that
        fails.
        """
        kind, challenge = parse_challenge(answer.headers.get("WWW-Authenticate", ""))
        login = find_login(self._login_host)
        with self._lock:
            if kind == "basic" and login:
                self._authorization = "Basic " + base64.b64encode(":".join(login).encode()).decode()
            elif kind == "bearer":
                self._authorization = "Bearer " + self._token(challenge, login)

    def _token(self, challenge: Mapping[str, str], login: Login | None) -> str:
        realm = check_realm(challenge.get("realm", ""), self._host, self._scheme, self.where)
        self._realm = httpx2.URL(realm).host
        params = {key: challenge[key] for key in ("service", "scope") if challenge.get(key)}

        def send() -> httpx2.Response:
            if login and login[0] == "<token>":
                form = {
                    **params,
                    "grant_type": "refresh_token",
                    "client_id": "quantkit",
                    "refresh_token": login[1],
                }
                return self._client.post(realm, data=form)
            return self._client.get(realm, params=params, auth=login)

        answer = call_with_deadline(send, _ANSWER_SECONDS)
        if answer.status_code in {400, 401, 403}:
            raise TransferError(
                f"{self.where}: expected a valid login, found {answer.status_code}; "
                f"`docker login {self._login_host}`"
            )
        self._check(answer, missing=False)
        return parse_token(answer.content, self.where)


def format_digest(content: bytes) -> str:
    """Return the digest of a content as registries write it."""
    return "sha256:" + hashlib.sha256(content).hexdigest()
