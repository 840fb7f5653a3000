"""An artifact as an object: its report, and its quantized modules as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.layout import MANIFEST
from quantkit.artifact.read_manifest import (
    get_format_name,
    get_output_error,
    get_section,
    read_manifest,
)
from quantkit.artifact.read_report import read_artifact_report
from quantkit.errors import ArtifactError

SCHEME_COLUMNS = ("bits", "group_size", "symmetric")
COLUMNS = (
    "rule", "method", "rounding", "relative_error", "sqnr_db", "output_relative_error", "tokens",
    "rescaled", "fallbacks",
)  # fmt: skip
"""Columns of the modules' table from the manifest (artifact/records.py has their units)."""
FIGURES = ("relative_error", "sqnr_db", "output_relative_error")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An artifact's folder and its manifest; hashes are not checked (`quantkit.verify` does)."""

    path: Path
    manifest: Mapping[str, object]

    @classmethod
    def read(cls, path: Path) -> Artifact:
        """Read the manifest of the artifact in a folder; raises ArtifactError."""
        return cls(path=path, manifest=read_manifest(path))

    @property
    def format_name(self) -> str:
        """The format of the codes, e.g. "awq"."""
        return str(get_format_name(self.manifest))

    @cached_property
    def report(self) -> Fidelity:
        """The fidelity report; ArtifactError if it does not match the manifest."""
        return read_artifact_report(self.path)

    @cached_property
    def modules(self) -> Any:  # a pandas DataFrame, which may not be installed
        """One row per quantized module: `module`, SCHEME_COLUMNS and COLUMNS.

        A pandas DataFrame if pandas is installed, else a list of dicts. Raises ArtifactError.
        """
        rows = [
            self._make_row(name, entry)
            for name, entry in get_section(self.manifest, "modules", self.path).items()
        ]
        if find_spec("pandas") is None:
            return rows
        table = import_module("pandas").DataFrame(
            rows, columns=["module", *SCHEME_COLUMNS, *COLUMNS]
        )
        return table.astype(dict.fromkeys(FIGURES, float))  # None, without calibration, is NaN

    def _make_row(self, name: str, entry: object) -> dict[str, object]:
        """Return the row of a module."""
        scheme = entry.get("scheme") if isinstance(entry, Mapping) else None
        if not isinstance(entry, Mapping) or not isinstance(scheme, Mapping):
            raise ArtifactError(
                f"{self.path / MANIFEST}: modules.{name}: expected an object with a scheme, found "
                f"{type(entry).__name__}; pull it again"
            )
        return {
            "module": name,
            **{column: scheme.get(column) for column in SCHEME_COLUMNS},
            **{column: entry.get(column) for column in COLUMNS},
            "output_relative_error": get_output_error(entry),
        }
