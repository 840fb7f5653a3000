"""A signature vouches for every byte of an artifact: whatever is changed, added or taken away is
refused.

The files are sealed again after each change, so that the manifest agrees: only the signature can
report. Each case is counted as in test_bad_artifacts.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from support.damage import (
    edit_json,
    list_shards,
    overwrite_element,
    read_shard,
    rehash,
    reseal,
    set_status,
    write_shard,
)
from support.loadtest_example import make_load_test

from quantkit.artifact.layout import LOADTEST, MANIFEST, SIGNATURE
from quantkit.cli.main import main
from quantkit.publish.sign import PASSWORD

PACKED = "model.layers.1.mlp.experts.0.gate_proj.qweight"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A key's two files."""

    private: Path
    public: Path


def pair(place: Path, name: str, password: str | None = None) -> Pair:
    """A new key on P-256."""
    key = ec.generate_private_key(ec.SECP256R1())
    pair = Pair(private=place / f"{name}.pem", public=place / f"{name}.pub")
    hidden = (
        serialization.BestAvailableEncryption(password.encode())
        if password
        else serialization.NoEncryption()
    )
    pem = serialization.Encoding.PEM
    pair.private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, hidden))
    pair.public.write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return pair


@pytest.fixture
def keys(tmp_path: Path) -> Pair:
    """The signing key pair."""
    return pair(tmp_path, "key")


@pytest.fixture
def signed_artifact(artifact: Path, keys: Pair) -> Path:
    """An artifact with a signature inside."""
    assert run("sign", artifact, "--private-key", keys.private) == (
        0,
        f"{artifact}: signed, {artifact / SIGNATURE}\n",
    )
    return artifact


def run(*arguments: object) -> tuple[int, str]:
    """Return exit code and output; an error has nothing on stdout and one line on stderr, but
    for verify's list.
    """
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exit_code:
        assert result.stdout == "" and result.stderr.startswith("error: "), result.output
        return result.exit_code, result.stderr
    return 0, result.stdout


def check(path: Path, keys: Pair, *more: object) -> tuple[int, str]:
    """Verify with a public key."""
    return run("verify", path, "--signature", "--public-key", keys.public, *more)


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# --------------------------------------------------------------------------------- valid signatures


def test_verify_checks_signature_on_request(signed_artifact: Path, keys: Pair) -> None:
    code, text = check(signed_artifact, keys)
    assert code == 0 and text.endswith(f"not judged)\n  signed by the key {keys.public}\n")
    unchecked = run("verify", signed_artifact)[1].splitlines()
    assert unchecked[1].endswith("name the signer with --public-key")
    assert unchecked[2].startswith("  consistent: it is what its own manifest says; its origin was")
    values = json.loads(run("verify", signed_artifact, "--public-key", keys.public, "--json")[1])
    assert values["ok"] is True and values["signed_by"] == f"the key {keys.public}"
    assert json.loads(run("verify", signed_artifact, "--json")[1])["signed_by"] is None


def test_verify_reports_uncovered_load_test(signed_artifact: Path, keys: Pair) -> None:
    """It is added after the signature: allowed, but reported as not covered."""
    (signed_artifact / LOADTEST).write_text(make_load_test().model_dump_json())
    note = f"  not sealed by the manifest: {LOADTEST}, which a load test adds later\n"
    assert note in run("verify", signed_artifact)[1]
    code, text = check(signed_artifact, keys)
    assert code == 0 and text.endswith(
        f"{note}  signed by the key {keys.public}; the signature does not cover {LOADTEST}\n"
    )
    assert json.loads(check(signed_artifact, keys, "--json")[1])["unsealed"] == [LOADTEST]
    (signed_artifact / LOADTEST).write_text('{"evil": 1}')
    code, text = check(signed_artifact, keys)
    assert code == 1 and f"{LOADTEST}: tool: Field required" in text


def test_signature_can_be_stored_elsewhere(artifact: Path, keys: Pair, tmp_path: Path) -> None:
    place = tmp_path / "x.sig"
    assert run("sign", artifact, "--private-key", keys.private, "--signature", place)[0] == 0
    assert not (artifact / SIGNATURE).exists()
    assert run("verify", artifact, "--signature", place, "--public-key", keys.public)[0] == 0


def test_signatures_are_compatible_with_library(
    signed_artifact: Path, keys: Pair, tmp_path: Path
) -> None:
    """Its own program, with its own reading of the files."""
    library = [sys.executable, "-m", "model_signing"]
    inside, outside = signed_artifact / SIGNATURE, tmp_path / "theirs.sig"
    read = [
        *library,
        "verify",
        "key",
        signed_artifact,
        "--signature",
        inside,
        "--public_key",
        keys.public,
    ]
    assert subprocess.run(read, capture_output=True).returncode == 0
    flip(signed_artifact / "README.md", 20)
    assert subprocess.run(read, capture_output=True).returncode != 0
    flip(signed_artifact / "README.md", 20)
    inside.unlink()
    write = [
        *library,
        "sign",
        "key",
        signed_artifact,
        "--signature",
        outside,
        "--private_key",
        keys.private,
    ]
    subprocess.run(write, check=True, capture_output=True)
    assert (
        run("verify", signed_artifact, "--signature", outside, "--public-key", keys.public)[0] == 0
    )


def test_encrypted_key_requires_password(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = pair(tmp_path, "hidden", "open sesame")
    code, text = run("sign", artifact, "--private-key", keys.private)
    assert code == 2 and f"wrong or missing password; set {PASSWORD}" in text
    monkeypatch.setenv(PASSWORD, "open sesame")
    assert run("sign", artifact, "--private-key", keys.private)[0] == 0
    assert check(artifact, keys)[0] == 0


def test_sign_refuses_existing_signature(signed_artifact: Path, keys: Pair, tmp_path: Path) -> None:
    other = pair(tmp_path, "other")
    code, text = run("sign", signed_artifact, "--private-key", other.private)
    assert (
        code == 2
        and text
        == f"error: {signed_artifact / SIGNATURE}: exists already; pass --overwrite to replace the "
        "signature\n"
    )
    assert check(signed_artifact, keys)[0] == 0
    assert run("sign", signed_artifact, "--private-key", other.private, "--overwrite")[0] == 0
    assert check(signed_artifact, other)[0] == 0 and check(signed_artifact, keys)[0] == 1


def test_sign_refuses_damaged_artifact(artifact: Path, keys: Pair) -> None:
    flip(artifact / "tokenizer.json", 5)
    code, text = run("sign", artifact, "--private-key", keys.private)
    assert code == 1 and "tokenizer.json: expected sha256" in text
    assert not (artifact / SIGNATURE).exists()


# ------------------------------------------------------------------------------------- certificates


def certificates(place: Path, name: str) -> tuple[Path, Path, Path]:
    """A root's certificate, and the key and certificate of a signer below it."""
    root_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP256R1())
    root_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} root")])
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

    def made(
        subject: x509.Name, public: ec.EllipticCurvePublicKey, is_root: bool
    ) -> x509.Certificate:
        usage = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "crl_sign",
            ),
            False,
        )
        builder = x509.CertificateBuilder(
            subject_name=subject, issuer_name=root_name, public_key=public
        )
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(day).not_valid_after(day + datetime.timedelta(days=3650))
        builder = builder.add_extension(
            x509.BasicConstraints(ca=is_root, path_length=None), critical=True
        )
        allowed = x509.KeyUsage(
            digital_signature=not is_root,
            key_cert_sign=is_root,
            encipher_only=False,
            decipher_only=False,
            **usage,
        )
        return builder.add_extension(allowed, critical=True).sign(root_key, hashes.SHA256())

    root = made(root_name, root_key.public_key(), True)
    leaf = made(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key(), False)
    pem = serialization.Encoding.PEM
    files = place / f"{name}-root.crt", place / f"{name}.key", place / f"{name}.crt"
    hidden = serialization.NoEncryption()
    contents = (
        root.public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, hidden),
    )
    for file, content in zip(files, (*contents, leaf.public_bytes(pem))):
        file.write_bytes(content)
    return files


def test_certificate_is_checked(artifact: Path, tmp_path: Path) -> None:
    root, key, certificate = certificates(tmp_path, "us")
    stranger, other_key, _ = certificates(tmp_path, "others")
    code, text = run("sign", artifact, "--private-key", other_key, "--certificate", certificate)
    assert code == 2 and "does not match" in text
    assert run("sign", artifact, "--private-key", key, "--certificate", certificate)[0] == 0
    assert run("verify", artifact, "--certificate", root) == (
        0,
        run("verify", artifact)[1].partition("\n")[0] + "\n  signed by a certificate under "
        f"{root}\n",
    )
    code, text = run("verify", artifact, "--certificate", stranger)
    assert code == 1
    assert text == (
        f"error: {artifact / SIGNATURE}: not signed by a certificate under {stranger}: no trusted "
        "certificate covers it; do not use it\n"
    )
    edit_json(artifact / "quantkit/timings.json", lambda values: values.clear())
    assert "quantkit/timings.json was changed" in run("verify", artifact, "--certificate", root)[1]


# ------------------------------------------------------------------------------- refused signatures


def swap(path: Path) -> None:
    """The contents of two shards under each other's name."""
    one, other = list_shards(path)[:2]
    first, second = read_shard(one), read_shard(other)
    write_shard(one, second)
    write_shard(other, first)


def add(path: Path) -> None:
    """A file that the manifest then lists."""
    (path / "merges.txt").write_text("a b")


def better(path: Path) -> None:
    """A report with smaller errors, changed everywhere it appears."""
    edit_json(
        path / "quantkit/fidelity.json",
        lambda report: report["modules"][0].update(relative_error=0.01),
    )
    module = json.loads((path / "quantkit/fidelity.json").read_text())["modules"][0]["name"]
    edit_json(
        path / MANIFEST, lambda manifest: manifest["modules"][module].update(relative_error=0.01)
    )


def accept(path: Path) -> None:
    """A rejected artifact that says it was accepted."""
    set_status(
        path, "accepted", [{"figure": "kl_mean", "bound": "<= 1", "value": 0.001, "ok": True}]
    )


def remember(path: Path) -> None:
    """A manifest that knows less of the source."""
    edit_json(path / MANIFEST, lambda manifest: manifest["source"].update(files={}))


CHANGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit of the codes": (
        lambda path: overwrite_element(path, PACKED, 7, b"\1\2\3\4"),
        "safetensors was changed",
    ),
    "a flipped bit of the tokenizer": (
        lambda path: flip(path / "tokenizer.json", 5),
        "tokenizer.json was changed",
    ),
    "swapped shards": (swap, "model-00001-of-00003.safetensors was changed"),
    "an added file": (add, "merges.txt was added"),
    "a removed file": (
        lambda path: (path / "tokenizer_config.json").unlink(),
        "tokenizer_config.json is missing",
    ),
    "a removed recipe": (lambda path: (path / "recipe.yaml").unlink(), "recipe.yaml is missing"),
    "an edited report": (
        better,
        "quantkit/fidelity.json was changed, quantkit/manifest.json was changed",
    ),
    "a changed verdict": (accept, "quantkit/fidelity.json was changed"),
    "an edited model card": (
        lambda path: (path / "README.md").write_text("fine"),
        "README.md was changed",
    ),
    "an edited manifest": (remember, "quantkit/manifest.json was changed"),
    "edited timings": (
        lambda path: (path / "quantkit/timings.json").write_text("{}"),
        "timings.json was changed",
    ),
    "removed timings": (
        lambda path: (path / "quantkit/timings.json").unlink(),
        "timings.json is missing",
    ),
}
"""Changes after which the manifest's hashes are made right again."""


@pytest.mark.parametrize("fault", CHANGED)
def test_verify_refuses_change_after_signing(
    fault: str, signed_artifact: Path, keys: Pair, record_property: Callable[[str, object], None]
) -> None:
    record_property("reliability", "bad artifact")
    record_property("fault", f"signed: {fault}")
    change, sentence = CHANGED[fault]
    change(signed_artifact)
    reseal(signed_artifact)
    assert run("verify", signed_artifact)[0] == 0  # only the signature detects it
    code, text = check(signed_artifact, keys)
    assert code == 1 and len(text.splitlines()) == 1
    assert (
        text.startswith(
            f"error: {signed_artifact / SIGNATURE}: not the signature of {signed_artifact}: "
        )
        and sentence in text
    )


def other_key(path: Path, keys: Pair) -> None:
    """A signature by another key."""
    run("sign", path, "--private-key", pair(path.parent, "stranger").private, "--overwrite")


def other_hint(path: Path, keys: Pair) -> None:
    """A signature by another key that claims the right one."""
    right = json.loads((path / SIGNATURE).read_text())["verificationMaterial"]
    other_key(path, keys)
    edit_json(path / SIGNATURE, lambda bundle: bundle.update(verificationMaterial=right))


def another(path: Path, keys: Pair) -> None:
    """The signature of another artifact of the same hand."""
    there = path.parent / "there"
    subprocess.run(["cp", "-r", path, there], check=True)
    (there / SIGNATURE).unlink()
    (there / "README.md").write_text("another model")
    rehash(there)
    assert run("sign", there, "--private-key", keys.private)[0] == 0
    (there / SIGNATURE).rename(path / SIGNATURE)


def payload(path: Path, keys: Pair) -> None:
    """A list of files that was not signed under a signature that was."""
    import base64

    def change(bundle: dict[str, dict[str, str]]) -> None:
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        statement["predicate"]["resources"].pop()
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(
            json.dumps(statement).encode()
        ).decode()

    edit_json(path / SIGNATURE, change)


def cut(path: Path, share: float) -> None:
    """The first part of a signature."""
    content = (path / SIGNATURE).read_bytes()
    (path / SIGNATURE).write_bytes(content[: int(share * len(content))])


FORGED: dict[str, tuple[Callable[[Path, Pair], object], str]] = {
    "another key": (other_key, "it was made with another key"),
    "another key that claims to be this": (other_hint, "its content does not fit the signature"),
    "a signature of another artifact": (
        another,
        "README.md was changed, quantkit/manifest.json was changed",
    ),
    "a changed list under a signature": (payload, "its content does not fit the signature"),
    "no signature": (
        lambda path, _: (path / SIGNATURE).unlink(),
        "expected a signature, found none",
    ),
    "half a signature": (
        lambda path, _: cut(path, 0.5),
        "it is not complete JSON",
    ),
    "all but the end of a signature": (
        lambda path, _: cut(path, 0.999),
        "it is not complete JSON",
    ),
    "an empty signature": (
        lambda path, _: cut(path, 0),
        "it is not complete JSON",
    ),
    "an object that is no signature": (
        lambda path, _: (path / SIGNATURE).write_text("{}"),
        "it lacks a part",
    ),
    "a list that is no signature": (
        lambda path, _: (path / SIGNATURE).write_text("[]"),
        "it does not have the structure of a signature",
    ),
    "bytes that are no text": (
        lambda path, _: (path / SIGNATURE).write_bytes(b"\xff\xfe\x00"),
        "it is not text",
    ),
    "a signature without signatures": (
        lambda path, _: edit_json(
            path / SIGNATURE, lambda b: b["dsseEnvelope"].update(signatures=[])
        ),
        "it lacks a part",
    ),
    "a folder in place of a signature": (
        lambda path, _: [(path / SIGNATURE).unlink(), (path / SIGNATURE).mkdir()],
        "expected a signature, found none",
    ),
}


@pytest.mark.parametrize("fault", FORGED)
def test_verify_refuses_invalid_signature(
    fault: str, signed_artifact: Path, keys: Pair, record_property: Callable[[str, object], None]
) -> None:
    record_property("reliability", "bad artifact")
    record_property("fault", f"signature: {fault}")
    change, sentence = FORGED[fault]
    change(signed_artifact, keys)
    code, text = check(signed_artifact, keys)
    assert code == 1 and len(text.splitlines()) == 1 and sentence in text


@pytest.mark.parametrize("at", range(0, 1000, 83))
def test_verify_refuses_flipped_signature_bytes(at: int, signed_artifact: Path, keys: Pair) -> None:
    """Some bytes are free: names of unused fields. Every accepted signature covers the same
    list of files.
    """
    import base64

    before = json.loads((signed_artifact / SIGNATURE).read_text())["dsseEnvelope"]
    size = (signed_artifact / SIGNATURE).stat().st_size
    flip(signed_artifact / SIGNATURE, at * size // 1000)
    code, text = check(signed_artifact, keys)
    if code == 0:
        after = json.loads((signed_artifact / SIGNATURE).read_text())["dsseEnvelope"]
        assert base64.b64decode(after["payload"]) == base64.b64decode(before["payload"])
    else:
        assert code == 1 and len(text.splitlines()) == 1


# ---------------------------------------------------------------------------- usage errors


def test_signature_option_requires_identity(signed_artifact: Path, keys: Pair) -> None:
    for options in (["--signature"], ["--public-key", keys.public, "--certificate", keys.public]):
        code, text = run("verify", signed_artifact, *options)
        assert code == 2 and "expected one of --public-key, --certificate and --identity" in text
    assert run("verify", signed_artifact, "--identity", "a@b.c")[0] == 2
    assert run("sign", signed_artifact)[0] == 2
    assert run("sign", signed_artifact, "--sigstore", "--private-key", keys.private)[0] == 2
    assert (
        run("sign", signed_artifact, "--private-key", keys.private, "--chain", keys.public)[0] == 2
    )


def test_invalid_key_gives_one_sentence(signed_artifact: Path, keys: Pair, tmp_path: Path) -> None:
    for content, sentence in (
        (b"", "Unable to load PEM"),
        (keys.private.read_bytes(), "Valid PEM but no BEGIN PUBLIC"),
    ):
        (tmp_path / "none.pub").write_bytes(content)
        code, text = run("verify", signed_artifact, "--public-key", tmp_path / "none.pub")
        assert code == 2 and len(text.splitlines()) == 1 and sentence in text
    public = rsa.generate_private_key(65537, 2048).public_key()
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "rsa.pub").write_bytes(pem)
    code, text = run("verify", signed_artifact, "--public-key", tmp_path / "rsa.pub")
    assert code == 2 and "expected an elliptic curve key" in text


def test_unreachable_sigstore_gives_one_sentence(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request goes to a closed port."""
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (
        ("sign", artifact, "--sigstore"),
        (
            "verify",
            artifact,
            "--identity",
            "a@b.c",
            "--identity-provider",
            "https://accounts.example",
        ),
    ):
        if arguments[0] == "verify":
            (artifact / SIGNATURE).write_text("{}")
        code, text = run(*arguments)
        assert code == 1 and len(text.splitlines()) == 1
        assert "sigstore did not answer" in text and "needs a network" in text


def test_sign_names_missing_package(artifact: Path, keys: Pair) -> None:
    program = (
        "import sys; sys.modules['model_signing'] = None\n"
        "from quantkit.cli.main import main\n"
        "main(sys.argv[1:])"
    )  # fmt: skip
    plain = subprocess.run(
        [sys.executable, "-c", program, "verify", artifact], capture_output=True, text=True
    )
    assert plain.returncode == 0
    command = [sys.executable, "-c", program, "sign", artifact, "--private-key", keys.private]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "pip install 'quantkit[sign]'" in refused.stderr
