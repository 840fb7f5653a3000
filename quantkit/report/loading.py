"""Checks of names and shapes, as engines map them, in the report of a build."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkit.artifact.engine_reasons import NOT_FOR
from quantkit.artifact.fidelity_schema import EngineLoading, Fidelity
from quantkit.artifact.make_manifest import list_part_roots, make_module_entry
from quantkit.artifact.records import BlockRecord, list_kept_codes
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.plan.plan import Plan
from quantkit.report.make import account_source
from quantkit.verify.engines.check_loading import check_engines
from quantkit.verify.engines.compare import EngineCheck, join_faults


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
