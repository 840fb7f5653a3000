"""`quantkit verify`: whether an artifact is what its manifest says, can be served, and was made by whom it should."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantkit.artifact.layout import SIGNATURE
from quantkit.cli.console import as_json, handle_errors
from quantkit.cli.options import JSON
from quantkit.errors import UsageError
from quantkit.verify.shallow import VerifyReport, verify_artifact

if TYPE_CHECKING:
    from quantkit.verify.deep import DeepReport

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
INSIDE = "inside the artifact"


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--deep",
    is_flag=True,
    help="Prove a sample of its tensors from the source, which must be here.",
)
@click.option(
    "--sample",
    default="16",
    metavar="N|all",
    help="How many linears, and as many other tensors; default 16.",
)
@click.option("--seed", type=int, default=0, help="Which ones are drawn.")
@click.option(
    "--source",
    metavar="MODEL",
    help="Where the source is now, a folder or a Hub id; that is fetched.",
)
@click.option(
    "--signature",
    is_flag=False,
    flag_value=INSIDE,
    metavar="[FILE]",
    help=f"Ask for a signature too; without FILE the one in {SIGNATURE}. Any of the next options asks for it as well.",
)
@click.option("--public-key", type=FILE, help="The key, in PEM, of whoever must have signed.")
@click.option(
    "--certificate",
    type=FILE,
    multiple=True,
    help="A certificate under which the signer's must be.",
)
@click.option(
    "--identity",
    help="The sigstore identity of whoever must have signed: an e-mail address or a URL.",
)
@click.option("--identity-provider", help="The OpenID provider of that identity.")
@JSON
@handle_errors
def COMMAND(
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
    """Check every hash, header, number, index entry and the config of an artifact, each byte read once.

    --deep reads the source too: what was rounded without data is rounded again and compared bit for bit, of what
    calibration chose the recorded weight errors are computed again, and kept tensors must be the source's.

    Example: quantkit verify artifacts/tiny-v3-awq4 --deep
    """
    from quantkit.publish.sign import Trust, check_signature

    trust = Trust(
        public_key=public_key,
        certificates=certificate,
        identity=identity,
        provider=identity_provider,
    )
    asked = signature is not None or trust != Trust(certificates=())
    if asked and sum(map(bool, (public_key, certificate, identity))) != 1:
        raise UsageError(
            "who must have signed? expected one of --public-key, --certificate and --identity"
        )
    if bool(identity) != bool(identity_provider):
        raise UsageError("--identity and --identity-provider belong together; pass both")
    count = number(sample)
    found = verify_artifact(artifact)
    signed = None
    if asked:
        signed = check_signature(
            found, None if signature in {None, INSIDE} else Path(str(signature)), trust
        )
    proven = proofs(artifact, source, count, seed) if deep else None
    signer = trust.told if signed else None
    if json_out:
        told = {
            **figures(found),
            "signed_by": signer,
            **({"deep": deep_figures(proven)} if proven else {}),
        }
        as_json({"artifact": str(artifact), "ok": True, **told})
    else:
        show(found, signer, proven)


def number(sample: str) -> int | None:
    """How many of each are looked at; None for all."""
    if sample == "all":
        return None
    if not sample.isdecimal() or int(sample) == 0:
        raise UsageError(f"--sample: expected a number above 0 or all, found {sample!r}")
    return int(sample)


def show(found: VerifyReport, signer: str | None, proven: DeepReport | None) -> None:
    """What was checked, for people."""
    click.echo(
        f"{found.path}: ok ({found.files} files, {found.tensors} tensors, {found.n_bytes / 1e6:.1f} MB, {found.status})"
    )
    for note in found.notes:
        click.echo(f"  {note}")
    if found.unsealed:
        click.echo(
            f"  not sealed by the manifest: {' and '.join(found.unsealed)}, which a load test adds later"
        )
    if signer:
        besides = (
            f"; the signature does not cover {' and '.join(found.unsealed)}"
            if found.unsealed
            else ""
        )
        click.echo(f"  signed by {signer}{besides}")
    elif (found.path / SIGNATURE).is_file():
        click.echo(
            "  signed, but the signature was not checked: say who must have signed with --public-key"
        )
    if proven:
        from quantkit.verify.deep import iterate_report_lines

        for line in iterate_report_lines(proven):
            click.echo(f"  {line}")


def figures(found: VerifyReport) -> dict[str, object]:
    """What was checked, for machines."""
    return {
        "status": found.status,
        "files": found.files,
        "tensors": found.tensors,
        "bytes": found.n_bytes,
        "modules": found.modules,
        "unsealed": list(found.unsealed),
        "notes": list(found.notes),
    }


def proofs(artifact: Path, source: str | None, sample: int | None, seed: int) -> DeepReport:
    """Prove a sample; whoever watches sees which tensor is at hand."""
    from quantkit.verify.deep import verify_deep  # torch

    def tell(name: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"  {name}", err=True)

    return verify_deep(artifact, source, sample, seed, tell)


def deep_figures(proven: DeepReport) -> dict[str, object]:
    """What was proven, for machines: each tensor's kind of proof, and why nothing is proven of some."""
    return {
        "source": proven.source,
        "seed": proven.seed,
        "linears": proven.modules[0],
        "linears_in_all": proven.modules[1],
        "tensors": proven.tensors[0],
        "tensors_in_all": proven.tensors[1],
        "source_files_hashed": proven.files[0],
        "source_files": proven.files[1],
        "carried_files": proven.carried,
        "proofs": {proof.name: proof.kind for proof in proven.proofs},
        "not_proven": {proof.name: proof.reason for proof in proven.proofs if proof.reason},
    }
