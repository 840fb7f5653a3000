"""Signatures in the OpenSSF Model Signing format, by the `model-signing` library.

A signature covers every file of the artifact, including manifest and timings, except itself and a
load test, which is added later. The library signs and checks; the file hashes come from `verify`,
which reads each file once, and are passed to the library in place of its own list of files. The
library's `model_signing verify` reads these signatures as well. Only sigstore uses the network.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.artifact.layout import ADDED_LATER, MANIFEST, SIGNATURE, UNHASHED
from quantkit.checkpoint.scan import scan_file
from quantkit.errors import ArtifactError, QuantkitError, UsageError
from quantkit.io.files import read_bytes, write_atomic, write_output
from quantkit.io.path_safety import check_no_link
from quantkit.verify.shallow import VerifyReport, verify_artifact

PASSWORD = "QUANTKIT_KEY_PASSWORD"
TOKEN = "SIGSTORE_ID_TOKEN"
"""Environment variables: password of an encrypted key; sigstore's identity token."""

LIMIT_BYTES = 100_000_000
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Signing identity: a private key, optionally with certificate and chain; or sigstore."""

    private_key: Path | None = None
    certificate: Path | None = None
    chain: Sequence[Path] = ()
    sigstore: bool = False


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Trusted identity: a public key, root certificates, or a sigstore identity and its
    provider.
    """

    public_key: Path | None = None
    certificates: Sequence[Path] = ()
    identity: str | None = None
    provider: str | None = None

    @property
    def description(self) -> str:
        """The identity, for messages."""
        if self.public_key:
            return f"the key {self.public_key}"
        return (
            str(self.identity)
            if self.identity
            else f"a certificate under {', '.join(map(str, self.certificates))}"
        )


# --------------------------------------------------------------- the library's types for file lists


@dataclass(frozen=True, kw_only=True)
class Digest:
    """A hash, with the attributes that the library reads."""

    algorithm: str
    digest_hex: str

    @property
    def digest_value(self) -> bytes:
        """The hash as bytes."""
        return bytes.fromhex(self.digest_hex)


@dataclass(frozen=True, kw_only=True)
class Resource:
    """A file and its hash."""

    identifier: str
    digest: Digest


@dataclass
class HashedFiles:
    """Hashes of an artifact's files, used as the library's hashing configuration and as its result.

    It compares equal to any signed list and keeps that in `signed`, so that the caller can report
    the differences.
    """

    model_name: str
    sha256: Mapping[str, str]
    signed: dict[str, Digest] | None = field(default=None)

    @property
    def serialization_type(self) -> dict[str, Any]:
        """Parameters with which other tools reproduce the list."""
        ignored = [SIGNATURE, *ADDED_LATER]
        return {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": ignored,
        }

    def resource_descriptors(self) -> Iterator[Resource]:
        """Yield every file in the order of names."""
        for name, sha256 in sorted(self.sha256.items()):
            yield Resource(identifier=name, digest=Digest(algorithm="sha256", digest_hex=sha256))

    def hash(self, model_path: Path, *, files_to_hash: object = None) -> HashedFiles:
        """Return the hashes that exist already."""
        return self

    def add_ignored_paths(self, *, model_path: Path, paths: object) -> None:
        """Do nothing: a signature cannot exclude files from the comparison."""

    def __eq__(self, signed: object) -> bool:
        if not hasattr(signed, "resource_descriptors"):
            return NotImplemented
        self.signed = {
            resource.identifier: Digest(
                algorithm=resource.digest.algorithm, digest_hex=resource.digest.digest_hex
            )
            for resource in signed.resource_descriptors()
        }
        return True

    __hash__ = None  # type: ignore[assignment]  # mutable


def collect_hashes(verified: VerifyReport) -> HashedFiles:
    """Collect the hashes of a verified artifact, including files that its manifest does not
    hash.
    """
    unhashed = [name for name in (MANIFEST, *sorted(UNHASHED)) if (verified.path / name).is_file()]
    return HashedFiles(
        model_name=verified.path.resolve().name,
        sha256={**verified.sha256, **{name: scan_file(verified.path / name) for name in unhashed}},
    )


# ----------------------------------------------------------------------------------------- signing


def sign_artifact(
    artifact: Path, signer: Signer, output: Path | None, *, overwrite: bool = False
) -> Path:
    """Verify and sign an artifact; return the signature's path (default: inside the artifact).

    Raises ArtifactError if the artifact does not verify, UsageError for unusable keys and files.
    """
    place = output or check_no_link(artifact, SIGNATURE)
    if place.exists() and not overwrite:
        raise UsageError(f"{place}: exists already; pass --overwrite to replace the signature")
    signing = import_library("signing")
    config = signing.Config()
    with translate_errors(f"{signer.private_key or 'sigstore'}: cannot sign with it"):
        configure_signer(config, signer)
    files = collect_hashes(verify_artifact(artifact))
    config.set_hashing_config(files)
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "signature.json"
        with translate_errors(f"{artifact}: cannot be signed"):
            config.sign(artifact, temporary)
        write = write_output if output else write_atomic
        write(place, read_bytes(temporary, LIMIT_BYTES, ArtifactError))
    return place


def configure_signer(config: Any, signer: Signer) -> None:
    """Pass the signing identity to the library."""
    if signer.sigstore:
        config.use_sigstore_signer(
            use_ambient_credentials=True, identity_token=os.environ.get(TOKEN)
        )
    elif signer.certificate:
        chain = list(signer.chain) or [signer.certificate]  # the library refuses an empty chain
        config.use_certificate_signer(
            private_key=signer.private_key,
            signing_certificate=signer.certificate,
            certificate_chain=chain,
        )
    else:
        password = os.environ.get(PASSWORD)
        config.use_elliptic_key_signer(
            private_key=signer.private_key, password=None if password is None else password.encode()
        )


# --------------------------------------------------------------------------------------- verifying


def check_signature(verified: VerifyReport, signature: Path | None, trust: Trust) -> Path:
    """Check that a trusted identity signed exactly the verified files; return the signature's path.

    Raises ArtifactError for a missing or damaged signature, another signer or other files;
    UsageError for an unusable key or certificate.
    """
    place = signature or verified.path / SIGNATURE
    if not place.is_file():
        raise ArtifactError(
            f"{place}: expected a signature, found none: {verified.path} is not signed"
        )
    read_bytes(place, LIMIT_BYTES, ArtifactError)
    config, files = import_library("verifying").Config(), collect_hashes(verified)
    with translate_errors(f"{trust.description}: cannot be checked with"):
        configure_verifier(config, trust)
    config.set_hashing_config(files)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the library prints warnings
            config.verify(verified.path, place)
    except Exception as fault:  # a forged signature can fail in any of five libraries
        raise ArtifactError(
            f"{place}: not signed by {trust.description}: {describe_reason(fault)}; do not use it"
        ) from fault
    if differs := describe_differences(files):
        raise ArtifactError(
            f"{place}: not the signature of {verified.path}: {differs}; do not use it, or sign it "
            "again"
        )
    return place


def configure_verifier(config: Any, trust: Trust) -> None:
    """Pass the trusted identity to the library."""
    if trust.public_key:
        config.use_elliptic_key_verifier(public_key=trust.public_key)
    elif trust.identity:
        config.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.provider)
    else:
        config.use_certificate_verifier(certificate_chain=list(trust.certificates))


def describe_differences(files: HashedFiles) -> str:
    """Describe how the files differ from the signed ones; empty if they are equal."""
    if not files.signed:
        return "it names no files"
    hashes = {
        name: Digest(algorithm="sha256", digest_hex=value) for name, value in files.sha256.items()
    }
    changes = [f"{name} was added" for name in sorted(set(hashes) - set(files.signed))]
    changes += [f"{name} is missing" for name in sorted(set(files.signed) - set(hashes))]
    changes += [
        f"{name} was changed"
        for name in sorted(set(hashes) & set(files.signed))
        if hashes[name] != files.signed[name]
    ]
    more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return ", ".join(changes[:SHOWN]) + more


# ------------------------------------------------------------------------------------- the library


def import_library(part: str) -> Any:
    """Import model_signing.signing or .verifying; raises UsageError if it is not installed."""
    from importlib import import_module

    try:
        return import_module(f"model_signing.{part}")
    except ImportError as fault:
        raise UsageError(
            f"signatures need the package model-signing, found no {fault.name}; pip install "
            "'quantkit[sign]'"
        ) from fault


@contextlib.contextmanager
def translate_errors(action: str) -> Iterator[None]:
    """Turn the library's errors about keys, certificates and the network into one sentence."""
    try:
        yield
    except QuantkitError:
        raise
    except Exception as fault:
        if type(fault).__module__.startswith(("sigstore", "tuf", "requests", "urllib3")):
            raise QuantkitError(
                f"{action}: sigstore did not answer ({describe_reason(fault)}); it needs a "
                "network, keys and certificates do not"
            ) from fault
        raise UsageError(f"{action}: {describe_reason(fault)}") from fault


REASONS: Mapping[str, str] = {
    "InvalidSignature": "its content does not fit the signature",
    "JSONDecodeError": "it is not complete JSON",
    "KeyError": "it lacks a part",
    "IndexError": "it lacks a part",
    "TypeError": "it does not have the structure of a signature",
    "UnicodeDecodeError": "it is not text",
    "FileNotFoundError": "there is no such file",
    "AttributeError": "expected an elliptic curve key (P-256, P-384 or P-521)",
    "X509StoreContextError": "no trusted certificate covers it",
}
"""Meaning of exceptions that the libraries raise without a message."""


def describe_reason(fault: Exception) -> str:
    """Format a library's exception as one line."""
    text = " ".join(str(fault).split())
    if isinstance(fault, TypeError) and "Password" in text:
        return f"wrong or missing password; set {PASSWORD} for an encrypted key only"
    if text.startswith("Key mismatch"):
        return "it was made with another key"
    meaning = REASONS.get(type(fault).__name__)
    return meaning or (text[:160] or type(fault).__name__)
