"""`quantkit sign`: put your name to an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import handle_errors
from quantkit.errors import UsageError
from quantkit.publish.sign import Signer, sign_artifact

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--private-key",
    type=FILE,
    help="Your elliptic curve key in PEM; QUANTKIT_KEY_PASSWORD opens it.",
)
@click.option(
    "--certificate",
    type=FILE,
    help="Your certificate in PEM, of that key: others trust who issued it.",
)
@click.option(
    "--chain",
    type=FILE,
    multiple=True,
    help="Certificates between yours and its root; more than once.",
)
@click.option(
    "--sigstore",
    is_flag=True,
    help="Sign as your OpenID identity, entered in sigstore's public log.",
)
@click.option(
    "--signature",
    type=click.Path(path_type=Path),
    help="Where to write; default: inside the artifact.",
)
@click.option("--overwrite", is_flag=True, help="Replace a signature.")
@handle_errors
def COMMAND(
    artifact: Path,
    private_key: Path | None,
    certificate: Path | None,
    chain: tuple[Path, ...],
    sigstore: bool,
    signature: Path | None,
    overwrite: bool,
) -> None:
    """Check an artifact and sign every file of it (OpenSSF Model Signing).

    Example: quantkit sign artifacts/tiny-v3-awq4 --private-key key.pem
    """
    if sigstore == (private_key is not None):
        raise UsageError("who signs? expected either --private-key FILE or --sigstore")
    if chain and not certificate or certificate and not private_key:
        raise UsageError(
            "--chain belongs to --certificate, and that to --private-key; pass all of them"
        )
    signer = Signer(
        private_key=private_key, certificate=certificate, chain=chain, sigstore=sigstore
    )
    click.echo(
        f"{artifact}: signed, {sign_artifact(artifact, signer, signature, overwrite=overwrite)}"
    )
