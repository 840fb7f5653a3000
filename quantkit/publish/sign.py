"""Who made an artifact: signatures in the format of OpenSSF Model Signing, by the `model-signing` library.

A signature covers every file of the artifact, the manifest and the timings included, but itself and a load test, which
is added later. The library makes and checks it; the files' hashes are those that `verify` took in its one reading,
handed to the library as its own lists of files are. `model_signing verify` of the library reads such signatures too.
Nothing is fetched but for sigstore.
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
from quantkit.verify.shallow import VerifyReport, verify_artifact

PASSWORD = "QUANTKIT_KEY_PASSWORD"
TOKEN = "SIGSTORE_ID_TOKEN"
"""Environment variables: the password of an encrypted key; sigstore's own for an identity token."""

LIMIT_BYTES = 100_000_000
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Who signs: a private key, with its certificate and the chain above it if there is one; or sigstore."""

    private_key: Path | None = None
    certificate: Path | None = None
    chain: Sequence[Path] = ()
    sigstore: bool = False


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whose signature counts: a public key, certificates that vouch, or an identity of sigstore and its provider."""

    public_key: Path | None = None
    certificates: Sequence[Path] = ()
    identity: str | None = None
    provider: str | None = None

    @property
    def told(self) -> str:
        """Who that is, for a sentence."""
        if self.public_key:
            return f"the key {self.public_key}"
        return (
            str(self.identity)
            if self.identity
            else f"a certificate under {', '.join(map(str, self.certificates))}"
        )


# ------------------------------------------------------------------------------- the library's words for lists of files


@dataclass(frozen=True, kw_only=True)
class Digest:
    """A hash as the library has it."""

    algorithm: str
    digest_hex: str

    @property
    def digest_value(self) -> bytes:
        """The same in bytes."""
        return bytes.fromhex(self.digest_hex)


@dataclass(frozen=True, kw_only=True)
class Resource:
    """A file and its hash."""

    identifier: str
    digest: Digest


@dataclass
class HashedFiles:
    """The files of an artifact where the library expects a hashing configuration, and the list that one makes.

    It compares equal to any signed list and keeps it in `signed`, so that whoever asks can say what differs.
    """

    model_name: str
    sha256: Mapping[str, str]
    signed: dict[str, Digest] | None = field(default=None)

    @property
    def serialization_type(self) -> dict[str, Any]:
        """How others must hash the folder to get the same list."""
        later = [SIGNATURE, *ADDED_LATER]
        return {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": later,
        }

    def resource_descriptors(self) -> Iterator[Resource]:
        """Every file, in the order of names."""
        for name, found in sorted(self.sha256.items()):
            yield Resource(identifier=name, digest=Digest(algorithm="sha256", digest_hex=found))

    def hash(self, model_path: Path, *, files_to_hash: object = None) -> HashedFiles:
        """What was hashed already."""
        return self

    def add_ignored_paths(self, *, model_path: Path, paths: object) -> None:
        """A signature cannot take files out of the comparison."""

    def __eq__(self, signed: object) -> bool:
        if not hasattr(signed, "resource_descriptors"):
            return NotImplemented
        self.signed = {
            each.identifier: Digest(
                algorithm=each.digest.algorithm, digest_hex=each.digest.digest_hex
            )
            for each in signed.resource_descriptors()
        }
        return True

    __hash__ = None  # type: ignore[assignment]  # it changes


def collect_hashes(verified: VerifyReport) -> HashedFiles:
    """The files of an artifact that was verified, with those that its manifest does not hash."""
    beside = [name for name in (MANIFEST, *sorted(UNHASHED)) if (verified.path / name).is_file()]
    return HashedFiles(
        model_name=verified.path.resolve().name,
        sha256={**verified.sha256, **{name: scan_file(verified.path / name) for name in beside}},
    )


# --------------------------------------------------------------------------------------------------------- signing


def sign_artifact(
    artifact: Path, signer: Signer, output: Path | None, *, overwrite: bool = False
) -> Path:
    """Sign an artifact that verifies; returns the signature's file, quantkit/signature.json inside it by default.

    Raises ArtifactError for an artifact that does not verify, UsageError for keys and files that cannot be used.
    """
    place = output or artifact / SIGNATURE
    if place.exists() and not overwrite:
        raise UsageError(f"{place}: is signed already; pass --overwrite to sign it anew")
    signing = import_library("signing")
    config = signing.Config()
    with translate_errors(f"{signer.private_key or 'sigstore'}: cannot sign with it"):
        configure_signer(config, signer)
    files = collect_hashes(verify_artifact(artifact))
    config.set_hashing_config(files)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "signature.json"
        with translate_errors(f"{artifact}: cannot be signed"):
            config.sign(artifact, made)
        write = write_output if output else write_atomic
        write(place, read_bytes(made, LIMIT_BYTES, ArtifactError))
    return place


def configure_signer(config: Any, signer: Signer) -> None:
    """Tell the library who signs."""
    if signer.sigstore:
        config.use_sigstore_signer(
            use_ambient_credentials=True, identity_token=os.environ.get(TOKEN)
        )
    elif signer.certificate:
        chain = list(signer.chain) or [signer.certificate]  # the library refuses a chain of none
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


# ------------------------------------------------------------------------------------------------------- verifying


def check_signature(verified: VerifyReport, signature: Path | None, trust: Trust) -> Path:
    """Whether somebody trusted signed exactly these files; the signature's file.

    Raises ArtifactError for an artifact without signature, a signature that is damaged or by somebody else, and one of
    other files than those that were verified; UsageError for a key or certificate that cannot be used.
    """
    place = signature or verified.path / SIGNATURE
    if not place.is_file():
        raise ArtifactError(
            f"{place}: expected a signature, found none: nobody vouches for {verified.path}"
        )
    read_bytes(place, LIMIT_BYTES, ArtifactError)
    config, files = import_library("verifying").Config(), collect_hashes(verified)
    with translate_errors(f"{trust.told}: cannot be checked with"):
        configure_verifier(config, trust)
    config.set_hashing_config(files)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the library prints warnings
            config.verify(verified.path, place)
    except Exception as fault:  # what a forged signature breaks first, in one of five libraries
        raise ArtifactError(
            f"{place}: not signed by {trust.told}: {describe_reason(fault)}; do not use it"
        ) from fault
    if differs := describe_differences(files):
        raise ArtifactError(
            f"{place}: not the signature of {verified.path}: {differs}; do not use it, or have it signed anew"
        )
    return place


def configure_verifier(config: Any, trust: Trust) -> None:
    """Tell the library whose signature counts."""
    if trust.public_key:
        config.use_elliptic_key_verifier(public_key=trust.public_key)
    elif trust.identity:
        config.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.provider)
    else:
        config.use_certificate_verifier(certificate_chain=list(trust.certificates))


def describe_differences(files: HashedFiles) -> str:
    """How the files differ from those that were signed; nothing when they are the same."""
    if not files.signed:
        return "it names no files"
    found = {
        name: Digest(algorithm="sha256", digest_hex=value) for name, value in files.sha256.items()
    }
    told = [f"{name} was added" for name in sorted(set(found) - set(files.signed))]
    told += [f"{name} is missing" for name in sorted(set(files.signed) - set(found))]
    told += [
        f"{name} was changed"
        for name in sorted(set(found) & set(files.signed))
        if found[name] != files.signed[name]
    ]
    more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    return ", ".join(told[:SHOWN]) + more


# ------------------------------------------------------------------------------------------------------ the library


def import_library(part: str) -> Any:
    """model_signing.signing or .verifying; UsageError when it is not installed."""
    from importlib import import_module

    try:
        return import_module(f"model_signing.{part}")
    except ImportError as fault:
        raise UsageError(
            f"signatures need the package model-signing, found no {fault.name}; pip install 'quantkit[sign]'"
        ) from fault


@contextlib.contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """The library's errors over keys, certificates and the network as one sentence."""
    try:
        yield
    except QuantkitError:
        raise
    except Exception as fault:
        if type(fault).__module__.startswith(("sigstore", "tuf", "requests", "urllib3")):
            raise QuantkitError(
                f"{what}: sigstore did not answer ({describe_reason(fault)}); it needs a network, keys and certificates do not"
            ) from fault
        raise UsageError(f"{what}: {describe_reason(fault)}") from fault


REASONS: Mapping[str, str] = {
    "InvalidSignature": "its content does not fit the signature",
    "JSONDecodeError": "it is no JSON, or not all of it is there",
    "KeyError": "it lacks a part",
    "IndexError": "it lacks a part",
    "TypeError": "it has another form than signatures have",
    "UnicodeDecodeError": "it is no text",
    "FileNotFoundError": "there is no such file",
    "AttributeError": "expected an elliptic curve key (P-256, P-384 or P-521)",
    "X509StoreContextError": "no trusted certificate vouches for it",
}
"""What the exceptions that libraries raise without words mean here."""


def describe_reason(fault: Exception) -> str:
    """What a library had to say, in one line."""
    text = " ".join(str(fault).split())
    if isinstance(fault, TypeError) and "Password" in text:
        return f"wrong or missing password; set {PASSWORD} for an encrypted key, and nothing for a plain one"
    if text.startswith("Key mismatch"):
        return "it was made with another key"
    meaning = REASONS.get(type(fault).__name__)
    return meaning or (text[:160] or type(fault).__name__)
