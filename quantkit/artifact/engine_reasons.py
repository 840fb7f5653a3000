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
    notes, reasons = read_summary(artifact).get("notes"), {}
    for note in notes if isinstance(notes, list) else ():
        engine, mark, reason = str(note).removeprefix(NOT_FOR).partition(": ")
        if str(note).startswith(NOT_FOR) and mark:
            reasons[engine] = reason.removesuffix(".")
    return reasons


def read_served_engines(artifact: Path) -> list[str]:
    """Return the engines for which an artifact's report has a command; none without a report.

    Raises ArtifactError for an unreadable file.
    """
    serving = read_summary(artifact).get("serving")
    entries = serving if isinstance(serving, list) else []
    return [str(entry.get("engine")) for entry in entries if isinstance(entry, dict)]


def read_summary(artifact: Path) -> dict[str, object]:
    """Return the entry of the artifact in its report, {} without one.

    Raises ArtifactError for an unreadable file.
    """
    path = artifact / FIDELITY
    summary = read_json(path, ArtifactError).get("artifact") if is_file(path) else None
    return summary if isinstance(summary, dict) else {}
