"""`quantkit verify`: whether an artifact is what its manifest says."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.console import as_json, failing_well
from quantkit.options import JSON
from quantkit.verify import verify


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@JSON
@failing_well
def COMMAND(artifact: Path, json_out: bool) -> None:
    """Check every hash, header, index entry and the config of an artifact against its manifest.

    Example: quantkit verify artifacts/tiny-v3-awq4
    """
    found = verify(artifact)
    told = {"status": found.status, "files": found.files, "tensors": found.tensors, "bytes": found.n_bytes}
    if json_out:
        as_json({"artifact": str(artifact), "ok": True, **told})
    else:
        click.echo(
            f"{artifact}: ok ({found.files} files, {found.tensors} tensors, {found.n_bytes / 1e6:.1f} MB, "
            f"{found.status})"
        )
