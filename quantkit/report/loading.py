"""Engines that load an artifact: checks of names and shapes in its report, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkit.artifact.engine_reasons import NOT_FOR
from quantkit.artifact.fidelity_schema import EngineLoading, Fidelity
from quantkit.artifact.make_manifest import list_part_roots, make_module_entry
from quantkit.artifact.records import BlockRecord, list_kept_codes
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.formats.common.engine_names import DISABLE_SHARED_FUSION, TRIED
from quantkit.plan.plan import Plan
from quantkit.report.make import account_source
from quantkit.report.table import Table
from quantkit.verify.engines.check_loading import check_engines
from quantkit.verify.engines.compare import EngineCheck, join_faults

NOT_TRIED = "no test of quantkit runs it"
UNKNOWN = "not checked"


def add_checks(
    fidelity: Fidelity, plan: Plan, source: Checkpoint, blocks: Sequence[BlockRecord], folder: Path
) -> Fidelity:
    """Return the report with the account of the source's tensors and the checks of engines.

    An engine whose model and the files do not fit loses its command and gets a note, so that
    `quantkit serve` refuses it; the artifact itself is what the plan says. Raises ArtifactError if
    a tensor of the source is missing.
    """
    records = [record for block in blocks for record in block.modules] + list_kept_codes(plan)
    checks = check_engines(
        folder,
        plan.format_name,
        {record.module: make_module_entry(record) for record in records},
        list_part_roots(plan) if plan.layout.parts else (),
        [serving.engine for serving in fidelity.artifact.serving],
    )
    failed = {check.engine: check for check in checks if check.faults}
    notes = (f"{NOT_FOR}{name}: {join_faults(x.faults)}." for name, x in failed.items())
    serving = (x for x in fidelity.artifact.serving if x.engine not in failed)
    artifact = fidelity.artifact.model_copy(
        update={"serving": tuple(serving), "notes": (*fidelity.artifact.notes, *notes)}
    )
    return fidelity.model_copy(
        update={
            "artifact": artifact,
            "source_tensors": account_source(plan, source, folder).describe(),
            "loading": tuple(make_row(check) for check in checks),
        }
    )


def make_row(check: EngineCheck) -> EngineLoading:
    """Return a check as a value of the report."""
    return EngineLoading(
        engine=check.engine,
        version=check.version,
        how=check.how,
        reason=check.reason,
        tensors=check.tensors,
        skipped=check.skipped,
        faults=check.faults,
    )


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
