"""What is to be served: its size, which engines read it, and what they must be told. No torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantkit import registry
from quantkit.artifact.layout import FIDELITY, MANIFEST
from quantkit.artifact.read_manifest import get_section, read_manifest
from quantkit.checkpoint.shards import open_shards
from quantkit.errors import ArtifactError, UsageError
from quantkit.formats.common.engine_names import SERVERS, TRANSFORMERS, has_separate_shared_experts
from quantkit.io.files import read_json
from quantkit.io.package_data import is_recipe_name
from quantkit.io.suggestions import format_unknown_name
from quantkit.serve.sizing.model import Model
from quantkit.serve.sizing.read import read_model

Kind = Literal["artifact", "model", "config"]
TEMPLATES = ("chat_template.jinja", "chat_template.json", "chat_templates")
LARGEST_VOCABULARY_FILE = 64_000_000


@dataclass(frozen=True, kw_only=True)
class Target:
    """An artifact, an ordinary model folder, or a config alone (nothing to run: `--dry-run` only).

    engines: name -> the command that its format ships; refused: engine -> why it cannot serve this one;
    fused_apart: shared experts are stored otherwise than routed ones; chat: a chat template is there, None: not known.
    """

    path: str
    name: str
    kind: Kind
    model: Model
    engines: Mapping[str, str]
    refused: Mapping[str, str]
    fused_apart: bool
    chat: bool | None
    status: str = ""


def read_target(target: str) -> Target:
    """What a folder, a config.json or a hub id holds; UsageError or CheckpointError as sizing says."""
    path = Path(target)
    if is_recipe_name(target):
        raise UsageError(
            f"{target}: expected an artifact, found a recipe; build it, and name the folder it makes"
        )
    model = read_model(target)
    if (path / MANIFEST).is_file():
        return artifact_target(path, model)
    kind: Kind = "model" if model.read_from == "headers" else "config"
    names = open_shards(path).specs if kind == "model" and path.is_dir() else ()
    served = {**SERVERS, **TRANSFORMERS}
    return Target(
        path=target,
        name=target.rstrip("/").rpartition("/")[2]
        if kind == "model" or not path.is_file()
        else path.parent.name,
        kind=kind,
        model=model,
        engines=served,
        refused={},
        fused_apart=has_separate_shared_experts(names),
        chat=chat_template(path) if path.is_dir() else None,
    )


def artifact_target(path: Path, model: Model) -> Target:
    """An artifact of quantkit: its manifest says the format, its report which engines read what is in it."""
    manifest = read_manifest(path)
    name = str(manifest.get("format") or by_config(model.config.values.get("quantization_config")))
    if name not in registry.list_names("formats"):
        raise ArtifactError(
            f"{path / MANIFEST}: {format_unknown_name('format', name, registry.list_names('formats'))}"
        )
    engines = dict(registry.get_format(name).engines)
    served = told_engines(path)
    why = "its report names the engines that load what is quantized here, and not this one"
    refused = {engine: why for engine in engines if served is not None and engine not in served}
    return Target(
        path=str(path),
        name=path.resolve().name,
        kind="artifact",
        model=model,
        engines=engines,
        refused=refused,
        fused_apart=has_separate_shared_experts(get_section(manifest, "tensors", path)),
        chat=chat_template(path),
        status=str(manifest.get("status")),
    )


def by_config(entry: object) -> str:
    """The format by config.json, for artifacts of before manifests named it; gptq_v2 shares its method with gptq."""
    if not isinstance(entry, Mapping):
        return "dense"
    return str(entry.get("checkpoint_format") or entry.get("quant_method")).replace("-", "_")


def told_engines(path: Path) -> frozenset[str] | None:
    """Engines that the report says serve it; None without a report."""
    file = path / FIDELITY
    if not file.is_file():
        return None
    artifact = read_json(file, ArtifactError).get("artifact")
    serving = artifact.get("serving") if isinstance(artifact, dict) else None
    if not isinstance(serving, list):
        return None
    return frozenset(str(entry.get("engine")) for entry in serving if isinstance(entry, dict))


def chat_template(folder: Path) -> bool:
    """Whether the tokenizer brings a chat template."""
    if any((folder / name).exists() for name in TEMPLATES):
        return True
    file = folder / "tokenizer_config.json"
    if not file.is_file() or file.stat().st_size > LARGEST_VOCABULARY_FILE:
        return False
    return bool(read_json(file, UsageError).get("chat_template"))
