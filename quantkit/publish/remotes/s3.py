"""S3 and compatible stores: `s3://bucket/prefix`, through s3fs.

botocore finds credentials and endpoint (profiles, AWS_* variables, AWS_ENDPOINT_URL). An object has
its sha256 as metadata, set at creation, so later runs compare it without reading it. Large files
are uploaded in parts; parts of an interrupted upload are compared by MD5 and not sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

from fsspec.asyn import sync

from quantkit.errors import TransferError, UsageError
from quantkit.io.retry import TransientError
from quantkit.publish.hashed_upload import HashedReader
from quantkit.publish.remote import (
    BytesCallback,
    RemoteOptions,
    RemoteScheme,
    RemoteState,
    UploadFile,
    check_received,
    remove_secrets,
    translate_errors,
)
from quantkit.publish.remotes.fsspec import (
    FsspecRemote,
    check_sizes,
    compute_md5,
    compute_seconds,
)

PART_BYTES = 16 << 20
"""Bytes of a part; larger if a file would have more than 10,000 parts."""

MAX_PAGES = 100
"""Pages of a listing, of 1,000 entries each."""
_MAX_PARTS = 10_000
_AT_ONCE = 3
_SHA = "quantkit-sha256"

Parts = Mapping[int, tuple[str, int]]
"""ETag and bytes of existing parts, by number."""


class S3Remote:
    """Objects below a prefix."""

    def __init__(self, files: Any, root: str, where: str) -> None:
        self.where = where
        self._files = files
        self._bucket, _, self._prefix = root.strip("/").partition("/")
        self._below = FsspecRemote(
            files, root, where, partial(read_range, files), self._list_objects
        )

    def list_remote(self, items: Sequence[UploadFile], manifest: str) -> RemoteState:
        """Compare objects of equal size by the sha256 in their metadata, or by reading them."""
        present = self._below.sizes()
        same = [item for item in items if present.get(item.name) == item.n_bytes]
        with ThreadPoolExecutor(max_workers=8) as pool:
            matches = list(pool.map(self._holds, same))
        there = frozenset(item.name for item, match in zip(same, matches) if match)
        others = sorted(set(present) - {item.name for item in items} - {manifest})
        existing = self.fetch_manifest(manifest) if manifest in present else None
        return RemoteState(present=there, manifest=existing, others=tuple(others))

    def begin_upload(self, gone: Sequence[str]) -> None:
        """Remove the replaced files, the manifest first."""
        self._below.begin_upload(gone)

    def send(self, item: UploadFile, report_bytes: BytesCallback) -> None:
        """Upload an object or its missing parts; the returned MD5 must match the sent bytes."""
        size = choose_part_bytes(item.n_bytes)
        if item.n_bytes <= size:
            with HashedReader(item, size) as pieces:
                body = b"".join(pieces)
            answer = self._call(
                "put_object", item.name, {"Body": body, "Metadata": {_SHA: item.sha256}}
            )
            check_etag(self.where, item.name, answer, body)
            report_bytes(item.n_bytes)
            return
        upload, parts = self._unfinished(item.name)
        self._send_parts(item, upload, parts, report_bytes)
        if parts and not self._holds(
            item
        ):  # the unfinished upload was of another content with the same first part
            self._send_parts(item, None, {}, lambda _: None)

    def finalize(self, items: Sequence[UploadFile], manifest: UploadFile) -> str:
        """Check that all objects exist, then write the manifest."""
        check_sizes(self.where, items, self._below.sizes())
        self.send(manifest, lambda _: None)
        return self.where

    def fetch_manifest(self, name: str) -> bytes | None:
        """Return the manifest, checked by its sha256; None also for a missing bucket."""
        content = self._below.fetch_manifest(name)
        if content is not None:
            sha256 = self._call("head_object", name, {}).get("Metadata", {}).get(_SHA)
            check_received(content, sha256)
        return content

    def sizes(self) -> Mapping[str, int]:
        """Return the bytes of every file below the prefix."""
        return self._below.sizes()

    def read(self, name: str, first: int) -> Generator[bytes, None, None]:
        """Yield a file range by range."""
        return self._below.read(name, first)

    def close(self) -> None:
        """Do nothing: s3fs keeps its client for the whole process."""

    def _holds(self, item: UploadFile) -> bool:
        """Whether an object has the item's sha256 and, if uploaded in one part, its MD5."""
        head = self._call("head_object", item.name, {})
        sha256, etag = head.get("Metadata", {}).get(_SHA), read_plain_md5(head)
        if not sha256:
            return self._below.holds(item)
        return sha256 == item.sha256 and (etag is None or etag == compute_md5(item).hex())

    def _send_parts(
        self, item: UploadFile, upload: str | None, parts: Parts, report_bytes: BytesCallback
    ) -> None:
        name, size = item.name, choose_part_bytes(item.n_bytes)
        if upload is None:
            created = self._call("create_multipart_upload", name, {"Metadata": {_SHA: item.sha256}})
            upload = str(created["UploadId"])

        def send_part(number: int, body: bytes) -> str:
            there = parts.get(number)
            if there != (etag := hashlib.md5(body, usedforsecurity=False).hexdigest(), len(body)):
                answer = self._call(
                    "upload_part", name, {"UploadId": upload, "PartNumber": number, "Body": body}
                )
                check_etag(self.where, name, answer, body)
                etag = str(answer["ETag"]).strip('"')
            return etag

        etags: list[str] = []
        with HashedReader(item, size) as pieces, ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            for batch in batch_pieces(pieces, _AT_ONCE):
                etags += pool.map(
                    send_part, range(len(etags) + 1, len(etags) + 1 + len(batch)), batch
                )
                report_bytes(pieces.sent)
        listed = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        whole = {"UploadId": upload, "MultipartUpload": {"Parts": listed}}
        self._call("complete_multipart_upload", name, whole)

    def _unfinished(self, name: str) -> tuple[str | None, Parts]:
        """Return the newest unfinished upload of an object and its parts; none without
        permission.
        """
        key = self._key(name)
        try:
            with translate_errors(self.where):
                uploads = self._files.call_s3(
                    "list_multipart_uploads", Bucket=self._bucket, Prefix=key
                )
                ids = [
                    entry["UploadId"] for entry in uploads.get("Uploads", ()) if entry["Key"] == key
                ]
                if not ids:
                    return None, {}
                parts: dict[int, tuple[str, int]] = {}
                after = 0
                for _ in range(MAX_PAGES):
                    page = self._call(
                        "list_parts", name, {"UploadId": ids[-1], "PartNumberMarker": after}
                    )
                    parts |= {
                        p["PartNumber"]: (p["ETag"].strip('"'), p["Size"])
                        for p in page.get("Parts", ())
                    }
                    after = page.get("NextPartNumberMarker", 0)
                    if not page.get("IsTruncated"):
                        return ids[-1], parts
        except TransferError:
            pass
        return None, {}

    def _list_objects(self) -> dict[str, int]:
        """Return the bytes of every object below the prefix by name, from MAX_PAGES pages at
        most.
        """
        prefix = f"{self._prefix}/" if self._prefix else ""
        sizes, after = dict[str, int](), dict[str, str]()
        for _ in range(MAX_PAGES):
            page = self._files.call_s3(
                "list_objects_v2", Bucket=self._bucket, Prefix=prefix, **after
            )
            sizes |= {
                entry["Key"][len(prefix) :]: int(entry["Size"])
                for entry in page.get("Contents", ())
                if not entry["Key"].endswith("/")  # a folder that a console made
            }
            if not page.get("IsTruncated"):
                return sizes
            after = {"ContinuationToken": page["NextContinuationToken"]}
        raise TransferError(
            f"{self.where}: expected the folder of an artifact, found more than {MAX_PAGES} pages "
            "of files; check the address"
        )

    def _call(self, operation: str, name: str, values: Mapping[str, object]) -> dict[str, Any]:
        with translate_errors(self.where):
            return dict(
                self._files.call_s3(
                    operation, dict(values), Bucket=self._bucket, Key=self._key(name)
                )
            )

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".lstrip("/")


def read_range(files: Any, path: str, first: int, last: int) -> bytes:
    """Return bytes `first` to `last` - 1 of an object, and one more if the store sends more.

    s3fs holds whatever the store sends.
    """
    bucket, _, key = path.partition("/")
    answer = files.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={first}-{last - 1}")
    body, content = answer["Body"], bytearray()

    async def read() -> None:
        while len(content) <= last - first:
            piece = await body.read(last - first + 1 - len(content))
            if not piece:
                return
            content.extend(piece)

    try:
        sync(files.loop, read, timeout=compute_seconds(last - first))
    finally:
        body.close()
    return bytes(content)


def batch_pieces(pieces: Iterable[bytes], n: int) -> Iterator[list[bytes]]:
    """Yield lists of `n` pieces."""
    iterator = iter(pieces)
    while batch := list(islice(iterator, n)):
        yield batch


def choose_part_bytes(n_bytes: int) -> int:
    """Return the part size for a file of n_bytes."""
    return max(PART_BYTES, -(-n_bytes // _MAX_PARTS))


def read_plain_md5(answer: Mapping[str, Any]) -> str | None:
    """Return the MD5 of an object or part; None if its ETag is not one (encrypted, several
    parts).
    """
    etag = str(answer.get("ETag", "")).strip('"')
    plain = answer.get("ServerSideEncryption") in {None, "AES256"} and not answer.get(
        "SSECustomerAlgorithm"
    )
    return etag if plain and len(etag) == 32 else None


def check_etag(where: str, name: str, answer: Mapping[str, Any], body: bytes) -> None:
    """Raise TransientError if the server has other bytes than were sent."""
    if read_plain_md5(answer) not in {None, hashlib.md5(body, usedforsecurity=False).hexdigest()}:
        raise TransientError(f"{where}: {name}: received bytes differ from the sent ones")


def open_s3(rest: str, text: str, options: RemoteOptions) -> S3Remote:
    """Open the bucket and prefix of a URL."""
    import s3fs

    where = remove_secrets(text).rstrip("/")
    if not rest.partition("/")[0] or "@" in rest.partition("/")[0]:
        raise UsageError(
            f"{where}: expected an address like s3://bucket/prefix, found no bucket; name one"
        )
    with translate_errors(where):
        files = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    return S3Remote(files, rest, where)


REMOTE = RemoteScheme(open=open_s3, package="s3fs", extra="s3")
