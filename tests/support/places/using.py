"""Helpers that tests of publish and pull share."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import CliRunner, Result

from quantkit.artifact.layout import MANIFEST
from quantkit.cli.main import main
from quantkit.io.retry import RetryPolicy
from quantkit.publish.publish import publish_artifact
from quantkit.publish.pull import pull_artifact
from quantkit.publish.remote import RemoteOptions
from quantkit.publish.transfer import Transfer
from quantkit.verify.shallow import verify_artifact

RETRY_POLICY = RetryPolicy(first_wait=0.01, tries=4)
WRITING = RemoteOptions(writing=True, retry_policy=RETRY_POLICY)
LAST = "model-00003-of-00003.safetensors"

Record = Callable[[str, object], None]
"""pytest's record_property: counts an injected fault for `make reliability`."""


@contextmanager
def run_moto() -> Iterator[int]:
    """Yield the port of an S3 server."""
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    WSGIRequestHandler.disable_nagle_algorithm = True
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    yield port
    server.stop()


def publish_to(
    artifact: Path,
    address: str,
    retry_policy: RetryPolicy = RETRY_POLICY,
    *,
    jobs: int = 4,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Transfer:
    """Publish an artifact, also if it was not judged."""
    options = RemoteOptions(writing=True, jobs=jobs, retry_policy=retry_policy)
    return publish_artifact(
        artifact, address, options, lambda _: None, force=True, overwrite=overwrite, dry_run=dry_run
    )


def pull_from(
    address: str,
    folder: Path,
    retry_policy: RetryPolicy = RETRY_POLICY,
    *,
    jobs: int = 4,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Transfer:
    """Pull an artifact."""
    options = RemoteOptions(jobs=jobs, retry_policy=retry_policy)
    return pull_artifact(
        address, folder, options, lambda _: None, overwrite=overwrite, dry_run=dry_run
    )


def run_command(*words: object) -> Result:
    """Run the command line and check that it raises nothing."""
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def flip_last_bit(content: bytes) -> bytes:
    """Change one bit of the last byte."""
    return content[:-1] + bytes([content[-1] ^ 1])


def make_other_artifact(artifact: Path) -> Path:
    """Make another artifact: a copy with another model card and one more file."""
    path = Path(shutil.copytree(artifact, artifact.with_name("other")))
    manifest = json.loads((path / MANIFEST).read_text())
    for name, content in (("README.md", b"# another\n"), ("merges.txt", b"more")):
        (path / name).write_bytes(content)
        manifest["files"][name] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
    (path / MANIFEST).write_text(json.dumps(manifest))
    verify_artifact(path)
    return path
