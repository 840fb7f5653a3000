"""The table of the engines that load an artifact, from its report."""

from __future__ import annotations

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.formats.common.engine_names import DISABLE_SHARED_FUSION, TRIED
from quantkit.report.table import Table
from quantkit.verify.engines.compare import EngineCheck

NOT_TRIED = "no test of quantkit runs it"
UNKNOWN = "not checked"


def describe_loading(fidelity: Fidelity, engine: str) -> str:
    """Return how the names and shapes of an artifact were checked against an engine."""
    row = next((row for row in fidelity.loading if row.engine == engine), None)
    return EngineCheck(**row.model_dump()).describe_check() if row else UNKNOWN


def make_engine_table(fidelity: Fidelity) -> Table:
    """Return the engines that load the artifact, how that was checked, and the needed flag."""
    rows = tuple(
        (
            serving.engine,
            describe_loading(fidelity, serving.engine),
            describe_trial(serving.engine, fidelity.artifact.format),
            DISABLE_SHARED_FUSION if DISABLE_SHARED_FUSION in serving.command else "",
        )
        for serving in fidelity.artifact.serving
    )
    note = (
        "Names and shapes: every parameter of the engine's model has a tensor of the artifact, and "
        "every tensor has a parameter. Tried: the tests of quantkit load small models of this "
        "format with this version."
    )
    columns = ("engine", "names and shapes", "tried with", "needs")
    return Table(title="Engines", columns=columns, rows=rows, note=note if rows else "")


def describe_trial(engine: str, format_name: str) -> str:
    """Return the version of an engine with which tests load a format."""
    version, formats = TRIED.get(engine, ("", frozenset[str]()))
    return version if format_name in formats else NOT_TRIED
