"""`quantkit verify`: check an artifact against its manifest, its signature and its source."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantkit.artifact.layout import SIGNATURE
from quantkit.cli.console import echo, handle_errors, print_json
from quantkit.cli.options import JSON
from quantkit.errors import UsageError
from quantkit.publish.sign import Trust, check_signature
from quantkit.verify.shallow import VerifyReport, verify_artifact
from quantkit.verify.stamps import check_unchanged

if TYPE_CHECKING:
    from quantkit.verify.deep import DeepReport

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
INSIDE = "inside the artifact"
CONSISTENCY = (
    "consistent: it is what its own manifest says; its origin was not checked (--deep compares "
    "with the source, --public-key names a signer)"
)
"""Scope of the checks without a source and without a signature."""


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--deep",
    is_flag=True,
    help="Check a sample of its tensors against the source, which must be available.",
)
@click.option(
    "--sample",
    default="16",
    metavar="N|all",
    help="Number of linears, and of other tensors, to check; default 16.",
)
@click.option("--seed", type=int, default=0, help="Seed of the sample.")
@click.option(
    "--source",
    metavar="MODEL",
    help="The source: a folder, or a Hub id to download.",
)
@click.option(
    "--signature",
    is_flag=False,
    flag_value=INSIDE,
    metavar="[FILE]",
    help=f"Require a signature; default FILE: {SIGNATURE}. The next options require it, too.",
)
@click.option("--public-key", type=FILE, help="The public key of the expected signer, in PEM.")
@click.option(
    "--certificate",
    type=FILE,
    multiple=True,
    help="A certificate that must have issued the signer's.",
)
@click.option(
    "--identity",
    help="The sigstore identity of the expected signer: an e-mail address or a URL.",
)
@click.option("--identity-provider", help="The OpenID provider of that identity.")
@JSON
@handle_errors
def command(
    artifact: Path,
    deep: bool,
    sample: str,
    seed: int,
    source: str | None,
    signature: str | None,
    public_key: Path | None,
    certificate: tuple[Path, ...],
    identity: str | None,
    identity_provider: str | None,
    json_out: bool,
) -> None:
    """Check an artifact against its manifest.

    Checks every hash, header, number, index entry and the config, and that the folder holds one set
    of weights and no other kind of file, so that engines load the checked files; each byte is read
    once. This vouches for consistency, not for origin.

    --deep reads the source, too: tensors rounded without data are rounded again and compared bit
    for bit, for calibrated ones the recorded weight errors are computed again, and kept tensors,
    the config, tokenizer files and chat templates must equal the source's.

    Example: quantkit verify artifacts/tiny-v3-awq4 --deep
    """
    trust = Trust(
        public_key=public_key,
        certificates=certificate,
        identity=identity,
        provider=identity_provider,
    )
    is_signature_required = signature is not None or trust != Trust(certificates=())
    if is_signature_required and sum(map(bool, (public_key, certificate, identity))) != 1:
        raise UsageError(
            "expected one of --public-key, --certificate and --identity to name the signer"
        )
    if bool(identity) != bool(identity_provider):
        raise UsageError("--identity and --identity-provider belong together; pass both")
    count = parse_sample(sample)
    verified = verify_artifact(artifact)
    signed = None
    if is_signature_required:
        signed = check_signature(
            verified, None if signature in {None, INSIDE} else Path(str(signature)), trust
        )
    deep_report = run_deep_checks(artifact, source, count, seed) if deep else None
    check_unchanged(artifact, verified.stamps, "while it was verified")
    signer = trust.description if signed else None
    if json_out:
        print_json({
            "artifact": str(artifact),
            "ok": True,
            **make_json(verified),
            "signed_by": signer,
            "origin_checked": bool(signed or deep_report),
            **({"deep": make_deep_json(deep_report)} if deep_report else {}),
        })
    else:
        print_result(verified, signer, deep_report)


def parse_sample(sample: str) -> int | None:
    """Return the number of linears and other tensors to check; None for all."""
    if sample == "all":
        return None
    if not sample.isdecimal() or int(sample) == 0:
        raise UsageError(f"--sample: expected a number above 0 or all, found {sample!r}")
    return int(sample)


def print_result(
    verified: VerifyReport, signer: str | None, deep_report: DeepReport | None
) -> None:
    """Print the checks that passed."""
    echo(
        f"{verified.path}: ok ({verified.files} files, {verified.tensors} tensors, "
        f"{verified.n_bytes / 1e6:.1f} MB, {verified.status})"
    )
    for note in verified.notes:
        echo(f"  {note}")
    if verified.unsealed:
        echo(
            f"  not sealed by the manifest: {' and '.join(verified.unsealed)}, which a load test "
            "adds later"
        )
    if signer:
        uncovered = (
            f"; the signature does not cover {' and '.join(verified.unsealed)}"
            if verified.unsealed
            else ""
        )
        echo(f"  signed by {signer}{uncovered}")
    elif (verified.path / SIGNATURE).is_file():
        echo("  signed, but the signature was not checked: name the signer with --public-key")
    if not signer and not deep_report:
        echo(f"  {CONSISTENCY}")
    if deep_report:
        from quantkit.verify.deep import iterate_report_lines

        for line in iterate_report_lines(deep_report):
            echo(f"  {line}")


def make_json(verified: VerifyReport) -> dict[str, object]:
    """Return the checks that passed as JSON values."""
    return {
        "status": verified.status,
        "files": verified.files,
        "tensors": verified.tensors,
        "bytes": verified.n_bytes,
        "modules": verified.modules,
        "unsealed": list(verified.unsealed),
        "notes": list(verified.notes),
    }


def run_deep_checks(
    artifact: Path, source: str | None, sample: int | None, seed: int
) -> DeepReport:
    """Check a sample of tensors against the source; a terminal shows the current tensor."""
    from quantkit.verify.deep import verify_deep  # torch

    def print_tensor(name: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"  {name}", err=True)

    return verify_deep(artifact, source, sample, seed, print_tensor)


def make_deep_json(report: DeepReport) -> dict[str, object]:
    """Return as JSON values the kind of proof of each tensor, or the reason why there is none."""
    return {
        "source": report.source,
        "seed": report.seed,
        "linears": report.modules[0],
        "linears_in_all": report.modules[1],
        "tensors": report.tensors[0],
        "tensors_in_all": report.tensors[1],
        "source_files_hashed": report.files[0],
        "source_files": report.files[1],
        "carried_files": report.carried,
        "engines": {check.engine: check.describe_check() for check in report.engines},
        "proofs": {proof.name: proof.kind for proof in report.proofs},
        "not_proven": {proof.name: proof.reason for proof in report.proofs if proof.reason},
    }
