"""The model under evaluation: an artifact, an ordinary model, or the model of a server."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantkit.artifact.layout import FIDELITY, MANIFEST
from quantkit.artifact.read_manifest import get_section, read_manifest
from quantkit.artifact.read_report import read_report
from quantkit.checkpoint import hub
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import (
    ArtifactError,
    CheckpointError,
    EvaluationError,
    HubUnreachable,
    UsageError,
)
from quantkit.io.files import sha256_file

TargetKind = Literal["artifact", "model", "served"]
BackendName = Literal["transformers", "vllm", "openai"]
DEFAULT_TASKS = ("math", "code")


@dataclass(frozen=True, kw_only=True)
class EvaluationTarget:
    """The model under evaluation. `folder` is None if only a server has the model.

    `hash` covers an artifact's manifest (which seals every file), every byte of an ordinary model,
    or only the name of a served model.
    """

    name: str
    kind: TargetKind
    folder: Path | None
    hash: str


def resolve_target(name: str, backend: BackendName) -> EvaluationTarget:
    """Resolve a folder (artifact or model), `builtin:NAME`, a hub id or a served model.

    Raises UsageError if the name is none of these, HubUnreachable if the hub does not answer.
    """
    folder = Path(name)
    if (folder / MANIFEST).is_file():
        read_manifest(folder)
        digest = sha256_file(folder / MANIFEST, ArtifactError)
        return EvaluationTarget(
            name=folder.resolve().name, kind="artifact", folder=folder, hash=digest
        )
    if backend == "openai" and not folder.is_dir() and not name.startswith("builtin:"):
        digest = hashlib.sha256(name.encode()).hexdigest()
        return EvaluationTarget(name=name, kind="served", folder=None, hash=digest)
    try:
        model_folder = hub.resolve_model(name).folder
    except HubUnreachable:
        raise
    except CheckpointError as error:
        raise (error if folder.exists() else UsageError(str(error))) from None
    return EvaluationTarget(
        name=folder.resolve().name if folder.is_dir() else name,
        kind="model",
        folder=model_folder,
        hash=Checkpoint.open(model_folder).compute_content_hash(),
    )


def resolve_source(target: EvaluationTarget, name: str) -> EvaluationTarget:
    """Resolve an artifact's source model: `name`, or the manifest's if `name` is empty.

    Raises UsageError if the target is no artifact, EvaluationError if the model's fingerprint is
    not the manifest's.
    """
    if target.kind != "artifact" or target.folder is None:
        raise UsageError(
            f"--source: expected an artifact to compare with its source, found {target.name}"
        )
    recorded = get_section(read_manifest(target.folder), "source", target.folder)
    revision = recorded.get("revision")
    source_name = name or str(recorded.get("model"))
    folder = hub.resolve_model(source_name, str(revision) if revision and not name else None).folder
    source = Checkpoint.open(folder)
    if source.compute_fingerprint() != recorded.get("fingerprint"):
        raise EvaluationError(
            f"{source_name}: not the model that {target.name} was made from: fingerprint "
            f"{source.compute_fingerprint()[:12]}, the manifest has "
            f"{str(recorded.get('fingerprint'))[:12]}; name its folder with --source"
        )
    path = Path(source_name)
    return EvaluationTarget(
        name=path.resolve().name if path.is_dir() else source_name,
        kind="model",
        folder=folder,
        hash=source.compute_content_hash(),
    )


def select_default_tasks(target: EvaluationTarget) -> tuple[str, ...]:
    """Return the tasks of an artifact's own report; math and code for any other model."""
    folder = target.folder
    if target.kind == "artifact" and folder is not None and (folder / FIDELITY).is_file():
        return tuple(row.task for row in read_report(folder).benchmarks) or DEFAULT_TASKS
    return DEFAULT_TASKS
