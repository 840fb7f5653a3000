"""An OCI registry: `oci://host[:port]/name[:tag]`, to pull also `oci://host/name@sha256:...`.

A file is a blob, titled as `oras` titles files, so `oras pull` fetches these artifacts as well. The
image manifest under the tag names all blobs and is written last: without it there is no artifact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping, Sequence

from quantkit.errors import TransferError, UsageError
from quantkit.io.files import JSON_LIMIT_BYTES, shorten_repr
from quantkit.publish.oci_client import MANIFEST, OciClient
from quantkit.publish.remote import (
    BytesCallback,
    RemoteOptions,
    RemoteScheme,
    RemoteState,
    UploadFile,
    check_received,
    remove_secrets,
)

ARTIFACT_TYPE = "application/vnd.quantkit.artifact.v1"
TITLE = "org.opencontainers.image.title"
_EMPTY = "application/vnd.oci.empty.v1+json"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ADDRESS = re.compile(
    r"(?P<host>[A-Za-z0-9.-]+(?::\d+)?|\[[0-9a-fA-F:]+\](?::\d+)?)"
    r"/(?P<name>[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)

Blobs = Mapping[str, tuple[str, int]]
"""Digest and bytes by file name."""


class OciRemote:
    """A tag of a repository."""

    def __init__(self, client: OciClient, reference: str) -> None:
        self.where = client.where
        self._client, self._reference = client, reference
        self._blobs: Blobs | None = None

    def list_remote(self, items: Sequence[UploadFile], manifest: str) -> RemoteState:
        """Compare blobs by digest; another image under the tag counts as another file."""
        there = frozenset(item.name for item in items if self._client.has(f"sha256:{item.sha256}"))
        tagged = self._client.manifest(self._reference)
        if tagged is None:
            return RemoteState(present=there)
        existing = self.fetch_manifest(manifest)
        others = () if existing is not None else (f"another image under the tag {self._reference}",)
        return RemoteState(present=there, manifest=existing, others=others)

    def begin_upload(self, gone: Sequence[str]) -> None:
        """Do nothing: the tag refers to the old image until it is set."""

    def send(self, item: UploadFile, report_bytes: BytesCallback) -> None:
        """Upload one blob."""
        self._client.put_file(item, report_bytes)

    def finalize(self, items: Sequence[UploadFile], manifest: UploadFile) -> str:
        """Store the manifest as a blob, then set the tag."""
        for item in items:
            if not self._client.has(f"sha256:{item.sha256}"):
                raise TransferError(
                    f"{self.where}: {shorten_repr(item.name)}: expected the blob that was sent, "
                    "found none; publish again"
                )
        self._client.put(manifest.path.read_bytes())
        empty = {
            "mediaType": _EMPTY,
            "digest": self._client.put(b"{}"),
            "size": 2,
            "data": "e30=",
        }
        layers = [
            {
                "mediaType": "application/octet-stream",
                "digest": f"sha256:{item.sha256}",
                "size": item.n_bytes,
                "annotations": {TITLE: item.name},
            }
            for item in sorted([*items, manifest], key=lambda item: item.name)
        ]
        image = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT_TYPE,
            "config": empty,
            "layers": layers,
        }
        digest = self._client.set_tag(
            self._reference, json.dumps(image, separators=(",", ":")).encode()
        )
        return f"{self.where}@{digest}"

    def fetch_manifest(self, name: str) -> bytes | None:
        """Return the blob with that title, or None."""
        blobs = self._titles()
        if name not in blobs:
            return None
        digest, size = blobs[name]
        if size > JSON_LIMIT_BYTES:
            raise TransferError(
                f"{self.where}: {name}: expected at most {JSON_LIMIT_BYTES} bytes, found {size}"
            )
        content = bytearray()
        for piece in self._client.blob(digest, size, 0, name):
            content += piece
            if len(content) > size:
                break
        check_received(content, digest.removeprefix("sha256:"))
        return bytes(content)

    def sizes(self) -> Mapping[str, int]:
        """Return the files of the image that was seen first; a moved tag has no effect."""
        blobs = self._blobs if self._blobs is not None else self._titles()
        return {name: size for name, (_, size) in blobs.items()}

    def read(self, name: str, first: int) -> Generator[bytes, None, None]:
        """Yield the bytes of a blob."""
        blobs = self._blobs if self._blobs is not None else self._titles()
        if name not in blobs:
            raise TransferError(
                f"{self.where}: {shorten_repr(name)}: expected a blob, found none; publish it again"
            )
        return self._client.blob(*blobs[name], first, name)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _titles(self) -> Blobs:
        """Return digest and bytes of the titled layers of the tag."""
        image = self._client.manifest(self._reference)
        layers = image.get("layers") if image is not None else []
        titles: dict[str, tuple[str, int]] = {}
        for layer in layers if isinstance(layers, list) else []:
            digest, size, notes = (
                (layer.get(k) for k in ("digest", "size", "annotations"))
                if isinstance(layer, dict)
                else (None, None, None)
            )
            title = notes.get(TITLE) if isinstance(notes, dict) else None
            if not isinstance(title, str):
                continue
            if (
                not isinstance(digest, str)
                or not _DIGEST.fullmatch(digest)
                or type(size) is not int
                or size < 0
            ):
                raise TransferError(
                    f"{self.where}: {shorten_repr(title)}: expected a sha256 and a size; publish "
                    "it again"
                )
            if title in titles:
                raise TransferError(
                    f"{self.where}: {shorten_repr(title)}: expected one blob, found two; publish "
                    "it again"
                )
            titles[title] = digest, size
        self._blobs = titles
        return titles


def open_oci(rest: str, text: str, options: RemoteOptions) -> OciRemote:
    """Open the repository and tag of an address; the default tag is "latest"."""
    match = _ADDRESS.fullmatch(rest)
    if match is None or (options.writing and match["digest"]):
        raise UsageError(
            f"{remove_secrets(text)}: expected oci://host/name:tag with a name in small letters, "
            "found something else; check the address"
        )
    tag = match["tag"] or "latest"
    where = f"oci://{match['host']}/{match['name']}:{tag}" + (
        f"@{match['digest']}" if match["digest"] else ""
    )
    client = OciClient(match["host"], match["name"], where, options.jobs, options.retry_policy)
    return OciRemote(client, match["digest"] or tag)


REMOTE = RemoteScheme(open=open_oci, package="httpx2", extra="oci")
