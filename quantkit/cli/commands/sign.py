"""`quantkit sign`: sign an artifact."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import echo, handle_errors
from quantkit.errors import UsageError
from quantkit.publish.sign import Signer, sign_artifact

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--private-key",
    type=FILE,
    help="Your elliptic curve key in PEM; its password is read from QUANTKIT_KEY_PASSWORD.",
)
@click.option(
    "--certificate",
    type=FILE,
    help="The certificate of that key in PEM, for those who trust its issuer.",
)
@click.option(
    "--chain",
    type=FILE,
    multiple=True,
    help="A certificate between yours and its root; may be repeated.",
)
@click.option(
    "--sigstore",
    is_flag=True,
    help="Sign with your OpenID identity; it is recorded in sigstore's public log.",
)
@click.option(
    "--signature",
    type=click.Path(path_type=Path),
    help="Write the signature to this file; default: inside the artifact.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing signature.")
@handle_errors
def command(
    artifact: Path,
    private_key: Path | None,
    certificate: Path | None,
    chain: tuple[Path, ...],
    sigstore: bool,
    signature: Path | None,
    overwrite: bool,
) -> None:
    """Check an artifact and sign all of its files.

    The signature follows OpenSSF Model Signing.

    Example: quantkit sign artifacts/tiny-v3-awq4 --private-key key.pem
    """
    if sigstore == (private_key is not None):
        raise UsageError("expected either --private-key FILE or --sigstore to sign with")
    if chain and not certificate or certificate and not private_key:
        raise UsageError(
            "--chain needs --certificate, and --certificate needs --private-key; pass all of them"
        )
    signer = Signer(
        private_key=private_key, certificate=certificate, chain=chain, sigstore=sigstore
    )
    echo(f"{artifact}: signed, {sign_artifact(artifact, signer, signature, overwrite=overwrite)}")
