"""Fake OCI registry, stricter than real ones about digests, upload ranges and blobs of manifests.

Optionally requires a login.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import secrets
import threading

from support.places.served import HttpRequest, HttpResponse, HttpServer, make_json_response

TITLE = "org.opencontainers.image.title"
NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
USER, PASSWORD = "robot", "pa55:word-of-the-robot"


class FakeRegistry:
    """`blobs` by digest, `tags` to manifests by digest."""

    def __init__(self, login: str | None = None) -> None:
        self.login = login  # None, "basic" or "bearer"
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.uploads: dict[str, bytearray] = {}
        self.tokens: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.received = 0
        self.failing: tuple[random.Random, int] | None = (
            None  # every fifth response has this status
        )
        self._lock = threading.Lock()
        self._served = HttpServer(self.answer)
        self.port, self.close = self._served.port, self._served.close

    def answer(self, request: HttpRequest) -> HttpResponse:
        """Handle a request."""
        self.requests.append((request.method, request.path))
        if request.path == "/token":
            return self._token(request)
        if self.failing and self.failing[0].random() < 0.2:
            return make_error(self.failing[1], "UNAVAILABLE")
        refusal = self._refusal(request)
        if refusal:
            return refusal
        if request.path == "/v2/":
            return make_json_response(200, {})
        match = re.fullmatch(
            rf"/v2/({NAME})/(blobs/uploads/|blobs/uploads/[^/]+|blobs/[^/]+|manifests/[^/]+)",
            request.path,
        )
        if not match:
            return make_error(404, "NAME_INVALID")
        kind, _, reference = match[2].rpartition("/")
        if kind == "blobs/uploads":
            return self._upload(request, match[1], reference)
        return (
            self._blob(request, reference)
            if kind == "blobs"
            else self._manifest(request, reference)
        )

    def _refusal(self, request: HttpRequest) -> HttpResponse | None:
        authorization = request.headers.get("Authorization", "")
        if self.login == "basic" and authorization != make_basic_header():
            return make_error(401, "UNAUTHORIZED", {"WWW-Authenticate": 'Basic realm="registry"'})
        if self.login == "bearer":
            needed = "pull" if request.method in {"GET", "HEAD"} else "pull,push"
            held = self.tokens.get(authorization.removeprefix("Bearer "), "")
            if not set(needed.split(",")) <= set(held.split(",")):
                realm = f"http://127.0.0.1:{self.port}/token"
                challenge = f'Bearer realm="{realm}",service="here",scope="repository:x:{needed}"'
                return make_error(401, "UNAUTHORIZED", {"WWW-Authenticate": challenge})
        return None

    def _token(self, request: HttpRequest) -> HttpResponse:
        if request.headers.get("Authorization") != make_basic_header():
            return make_error(401, "UNAUTHORIZED")
        token = secrets.token_hex(16)
        self.tokens[token] = request.query["scope"].rpartition(":")[2]
        return make_json_response(200, {"token": token})

    def _upload(self, request: HttpRequest, name: str, upload: str) -> HttpResponse:
        if request.method == "POST" and not upload:
            upload = secrets.token_hex(8)
            self.uploads[upload] = bytearray()
            return HttpResponse(
                202, headers={"Location": f"/v2/{name}/blobs/uploads/{upload}", "Range": "0-0"}
            )
        held = self.uploads.get(upload)
        if held is None:
            return make_error(404, "BLOB_UPLOAD_UNKNOWN")
        place = {
            "Location": f"/v2/{name}/blobs/uploads/{upload}",
            "Range": f"0-{max(0, len(held) - 1)}",
        }
        if request.method == "GET":
            return HttpResponse(204, headers=place)
        with self._lock:
            content_range = re.fullmatch(
                r"(\d+)-(\d+)", request.headers.get("Content-Range", f"{len(held)}-0")
            )
            if content_range is None or int(content_range[1]) != len(held):
                return HttpResponse(416, headers=place)
            while piece := request.read():
                held += piece
                self.received += len(piece)
        place["Range"] = f"0-{max(0, len(held) - 1)}"
        if request.method == "PATCH":
            return HttpResponse(202, headers=place)
        digest = request.query.get("digest", "")
        del self.uploads[upload]
        if digest != format_digest(bytes(held)):
            return make_error(400, "DIGEST_INVALID")
        self.blobs[digest] = bytes(held)
        return HttpResponse(
            201, headers={"Location": f"/v2/{name}/blobs/{digest}", "Docker-Content-Digest": digest}
        )

    def _blob(self, request: HttpRequest, digest: str) -> HttpResponse:
        if digest not in self.blobs:
            return make_error(404, "BLOB_UNKNOWN")
        return HttpResponse(200, self.blobs[digest], {"Docker-Content-Digest": digest})

    def _manifest(self, request: HttpRequest, reference: str) -> HttpResponse:
        if request.method == "PUT":
            body = request.body()
            image = json.loads(body)
            assert request.headers["Content-Type"] == image["mediaType"]
            for blob in (image["config"], *image["layers"]):
                if len(self.blobs.get(blob["digest"], b"")) != blob["size"]:
                    return make_error(404, "MANIFEST_BLOB_UNKNOWN")
            digest = format_digest(body)
            self.manifests[digest] = body
            self.tags[reference] = digest
            return HttpResponse(201, headers={"Docker-Content-Digest": digest})
        digest = self.tags.get(reference, reference)
        if digest not in self.manifests:
            return make_error(404, "MANIFEST_UNKNOWN")
        kind = json.loads(self.manifests[digest])["mediaType"]
        return HttpResponse(
            200, self.manifests[digest], {"Content-Type": kind, "Docker-Content-Digest": digest}
        )


def format_digest(content: bytes) -> str:
    """Return the digest of a content as registries write it."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def make_basic_header() -> str:
    """Return the Authorization header of the only user."""
    return "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


def make_error(status: int, code: str, headers: dict[str, str] | None = None) -> HttpResponse:
    """Make an error response in the specification's format."""
    return make_json_response(
        status, {"errors": [{"code": code, "message": code.lower()}]}, headers
    )
