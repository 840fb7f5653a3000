"""The model to serve: its size, and the engines that read it. Without torch, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantkit import registry
from quantkit.artifact.engine_reasons import read_engine_reasons
from quantkit.artifact.layout import CONFIG, FIDELITY, MANIFEST
from quantkit.artifact.read_manifest import get_section, read_manifest
from quantkit.checkpoint.shards import open_shards
from quantkit.errors import ArtifactError, UsageError
from quantkit.formats.common.engine_names import SERVERS, TRANSFORMERS, has_separate_shared_experts
from quantkit.io.files import read_json
from quantkit.io.package_data import is_recipe_name
from quantkit.io.suggestions import format_unknown_name
from quantkit.plan.engine_limits import NO_CLASS_REASON
from quantkit.serve.sizing.model import Model
from quantkit.serve.sizing.read import read_model

TargetKind = Literal["artifact", "model", "config"]
TEMPLATES = ("chat_template.jinja", "chat_template.json", "chat_templates")
MAX_TOKENIZER_CONFIG_BYTES = 64_000_000


@dataclass(frozen=True, kw_only=True)
class Target:
    """An artifact, an ordinary model folder, or a config alone (`--dry-run` only).

    engines: name -> the command that the format declares. refused: engine -> reason why it cannot
    serve this model. has_separate_experts: shared experts are stored differently from routed ones.
    has_chat_template: None if unknown.
    """

    path: str
    name: str
    kind: TargetKind
    model: Model
    engines: Mapping[str, str]
    refused: Mapping[str, str]
    has_separate_experts: bool
    has_chat_template: bool | None
    status: str = ""


def read_target(target: str) -> Target:
    """Read a folder, a config.json or a hub id.

    Raises UsageError for a recipe, and UsageError or CheckpointError as `read_model` does.
    """
    path = Path(target)
    if is_recipe_name(target):
        raise UsageError(
            f"{target}: expected an artifact, found a recipe; build it, and name the folder it "
            "makes"
        )
    model = read_model(target)
    if (path / MANIFEST).is_file():
        return read_artifact_target(path, model)
    kind: TargetKind = "model" if model.read_from == "headers" else "config"
    tensor_names = open_shards(path).specs if kind == "model" and path.is_dir() else ()
    return Target(
        path=target,
        name=target.rstrip("/").rpartition("/")[2]
        if kind == "model" or not path.is_file()
        else path.parent.name,
        kind=kind,
        model=model,
        engines={**SERVERS, **TRANSFORMERS},
        refused=find_class_reasons(path),
        has_separate_experts=has_separate_shared_experts(tensor_names),
        has_chat_template=has_chat_template(path) if path.is_dir() else None,
    )


def read_artifact_target(path: Path, model: Model) -> Target:
    """Read an artifact: format from its manifest, engines from its fidelity report."""
    manifest = read_manifest(path)
    name = str(
        manifest.get("format") or infer_format(model.config.values.get("quantization_config"))
    )
    if name not in registry.list_names("formats"):
        raise ArtifactError(
            f"{path / MANIFEST}: "
            f"{format_unknown_name('format', name, registry.list_names('formats'))}"
        )
    engines = dict(registry.get_format(name).engines)
    reported = read_reported_engines(path)
    reason = "is not among the engines that its fidelity report names for its tensors"
    reasons = read_engine_reasons(path)
    refused = {
        engine: reasons.get(engine, reason)
        for engine in engines
        if reported is not None and engine not in reported
    }
    refused |= find_class_reasons(path)
    return Target(
        path=str(path),
        name=path.resolve().name,
        kind="artifact",
        model=model,
        engines=engines,
        refused=refused,
        has_separate_experts=has_separate_shared_experts(get_section(manifest, "tensors", path)),
        has_chat_template=has_chat_template(path),
        status=str(manifest.get("status")),
    )


def find_class_reasons(path: Path) -> dict[str, str]:
    """Return the engines that do not find the model's class in a folder's config.json."""
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file() or read_json(file, UsageError, infinite=True).get("architectures"):
        return {}
    return dict.fromkeys(SERVERS, NO_CLASS_REASON)


def infer_format(entry: object) -> str:
    """Return the format by config.json, for artifacts whose manifest does not name it.

    gptq_v2 shares its quant_method with gptq.
    """
    if not isinstance(entry, Mapping):
        return "dense"
    return str(entry.get("checkpoint_format") or entry.get("quant_method")).replace("-", "_")


def read_reported_engines(path: Path) -> frozenset[str] | None:
    """Return the engines that the fidelity report names; None without a report."""
    file = path / FIDELITY
    if not file.is_file():
        return None
    artifact = read_json(file, ArtifactError).get("artifact")
    serving = artifact.get("serving") if isinstance(artifact, dict) else None
    if not isinstance(serving, list):
        return None
    return frozenset(str(entry.get("engine")) for entry in serving if isinstance(entry, dict))


def has_chat_template(folder: Path) -> bool:
    """Return whether the tokenizer has a chat template."""
    if any((folder / name).exists() for name in TEMPLATES):
        return True
    file = folder / "tokenizer_config.json"
    if not file.is_file() or file.stat().st_size > MAX_TOKENIZER_CONFIG_BYTES:
        return False
    return bool(read_json(file, UsageError).get("chat_template"))
