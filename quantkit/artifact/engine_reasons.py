"""Which engines cannot load an artifact, by the notes of its report, read without its schema.

`verify` and `serve` read this much of a report without pydantic, which takes longer to import.
"""

from __future__ import annotations

from pathlib import Path

from quantkit.artifact.layout import FIDELITY
from quantkit.errors import ArtifactError
from quantkit.io.files import is_file, read_json

NOT_FOR = "Not for "
"""Begins the note of a report about an engine that cannot load the artifact."""


def read_engine_reasons(artifact: Path) -> dict[str, str]:
    """Return the engines that cannot load an artifact, with the reason, by the notes of its report.

    Empty without a report. Raises ArtifactError for an unreadable file.
    """
    path = artifact / FIDELITY
    summary = read_json(path, ArtifactError).get("artifact") if is_file(path) else None
    notes = summary.get("notes") if isinstance(summary, dict) else None
    reasons = {}
    for note in notes if isinstance(notes, list) else ():
        engine, mark, reason = str(note).removeprefix(NOT_FOR).partition(": ")
        if str(note).startswith(NOT_FOR) and mark:
            reasons[engine] = reason.removesuffix(".")
    return reasons
