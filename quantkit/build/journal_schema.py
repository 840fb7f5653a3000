"""Schema of the entries of a build's journal.

A journal lies next to the output and may come with a stranger's folder; its hashes detect damage,
not intent. Entries are checked before anything is resumed or removed because of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from quantkit.build.progress_log import CompletedStep, WaveCheckpoint
from quantkit.errors import ArtifactError
from quantkit.io.journal import Journal

_STRICT = ConfigDict(frozen=True, extra="forbid")


class SourceIdentity(BaseModel):
    """The source that a build began with; sha256 of each file."""

    revision: str | None
    files: dict[str, str]
    other_files: Annotated[str, Field(alias="other files")]


class BuildIdentity(BaseModel):
    """What decides the artifacts' bytes; compared as plain JSON, so only the source is typed."""

    model_config = ConfigDict(extra="allow")
    source: SourceIdentity


class BeganEntry(BaseModel):
    """The first entry."""

    model_config = _STRICT
    kind: Literal["began"]
    owner: str
    stamps: dict[str, list[int]]
    of: BuildIdentity


class StepEntry(BaseModel):
    """A finished step."""

    model_config = _STRICT
    kind: Literal["step"]
    step: CompletedStep


class WaveEntry(BaseModel):
    """A finished wave."""

    model_config = _STRICT
    kind: Literal["wave"]
    wave: WaveCheckpoint


class ReadyEntry(BaseModel):
    """Sealed artifacts of a loop: format -> sha256 of the manifest."""

    model_config = _STRICT
    kind: Literal["ready"]
    loop: int
    manifests: dict[str, str]


class ReplacesEntry(BaseModel):
    """An artifact that is replaced: sha256 of its manifest, or "link"."""

    model_config = _STRICT
    kind: Literal["replaces"]
    format: str
    manifest: str


_ENTRIES: TypeAdapter[Any] = TypeAdapter(
    list[
        Annotated[
            BeganEntry | StepEntry | WaveEntry | ReadyEntry | ReplacesEntry,
            Field(discriminator="kind"),
        ]
    ]
)


def open_build_journal(path: Path) -> Journal | None:
    """Open the journal of a build; None without a file.

    Raises ArtifactError for a damaged file and for entries of another shape, which other versions
    write: the checksum of each line is right.
    """
    journal = Journal.open(path)
    if journal is None:
        return None
    try:
        first, *rest = _ENTRIES.validate_python(journal.entries)
    except ValidationError as fault:
        details = fault.errors(include_url=False, include_input=False)[0]
        number = details["loc"][0] if details["loc"] else 0
        raise ArtifactError(
            f"{path}: line {int(number) + 1}: expected an entry of a build by this version of "
            "quantkit, found another; continue with the version that wrote it, or start over with "
            "--restart"
        ) from None
    if not isinstance(first, BeganEntry) or any(isinstance(entry, BeganEntry) for entry in rest):
        raise ArtifactError(
            f"{path}: expected the start of a build as its first entry only, found another; the "
            "journal is damaged, start over with --restart"
        )
    return journal
