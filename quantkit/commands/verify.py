"""`quantkit verify`: whether an artifact is what its manifest says, can be served, and was made by whom it should."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.console import as_json, failing_well
from quantkit.errors import UsageError
from quantkit.options import JSON
from quantkit.verify import SIGNATURE, Verified, verify

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
INSIDE = "inside the artifact"


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--signature",
    is_flag=False,
    flag_value=INSIDE,
    metavar="[FILE]",
    help=f"Ask for a signature too; without FILE the one in {SIGNATURE}. Any of the next options asks for it as well.",
)
@click.option("--public-key", type=FILE, help="The key, in PEM, of whoever must have signed.")
@click.option("--certificate", type=FILE, multiple=True, help="A certificate under which the signer's must be.")
@click.option("--identity", help="The sigstore identity of whoever must have signed: an e-mail address or a URL.")
@click.option("--identity-provider", help="The OpenID provider of that identity.")
@JSON
@failing_well
def COMMAND(
    artifact: Path,
    signature: str | None,
    public_key: Path | None,
    certificate: tuple[Path, ...],
    identity: str | None,
    identity_provider: str | None,
    json_out: bool,
) -> None:
    """Check every hash, header, number, index entry and the config of an artifact, each byte read once.

    Example: quantkit verify artifacts/tiny-v3-awq4
    """
    from quantkit.signing import Trust, check_signature

    trust = Trust(public_key=public_key, certificates=certificate, identity=identity, provider=identity_provider)
    asked = signature is not None or trust != Trust(certificates=())
    if asked and sum(map(bool, (public_key, certificate, identity))) != 1:
        raise UsageError("who must have signed? expected one of --public-key, --certificate and --identity")
    if bool(identity) != bool(identity_provider):
        raise UsageError("--identity and --identity-provider belong together; pass both")
    found = verify(artifact)
    signed = None
    if asked:
        signed = check_signature(found, None if signature in {None, INSIDE} else Path(str(signature)), trust)
    if json_out:
        as_json({"artifact": str(artifact), "ok": True, **figures(found), "signed_by": trust.told if signed else None})
        return
    click.echo(
        f"{artifact}: ok ({found.files} files, {found.tensors} tensors, {found.n_bytes / 1e6:.1f} MB, {found.status})"
    )
    for note in found.notes:
        click.echo(f"  {note}")
    if signed:
        click.echo(f"  signed by {trust.told}")
    elif (artifact / SIGNATURE).is_file():
        click.echo("  signed, but the signature was not checked: say who must have signed with --public-key")


def figures(found: Verified) -> dict[str, object]:
    """What was checked, for machines."""
    return {
        "status": found.status,
        "files": found.files,
        "tensors": found.tensors,
        "bytes": found.n_bytes,
        "modules": found.modules,
        "notes": list(found.notes),
    }
