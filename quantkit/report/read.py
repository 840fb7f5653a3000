"""The report of an artifact, read back from its fidelity.json."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from quantkit.errors import ArtifactError
from quantkit.report.schema import Fidelity
from quantkit.storage.files import read_json

FIDELITY = "quantkit/fidelity.json"


def read_report(artifact: Path) -> Fidelity:
    """The report inside an artifact's folder; ArtifactError when there is none or it cannot be read."""
    path = artifact / FIDELITY
    if not path.is_file():
        raise ArtifactError(f"{artifact}: no {FIDELITY}: not an artifact of quantkit, or its build did not finish")
    try:
        return Fidelity.model_validate(read_json(path, ArtifactError))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{path}: {where}: {first['msg']}; use the quantkit that made it, or pull it again"
        ) from None
