"""An artifact and the source it was made of, side by side; a source that is not what it was is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit import registry
from quantkit.artifact.read_manifest import get_format_name, get_section, read_manifest
from quantkit.checkpoint import hub
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.scan import scan_file
from quantkit.contracts import Absorber, Block, Format, Layout, LinearGroup, Scheme, TensorSpec
from quantkit.errors import ArtifactError, CheckpointError, UsageError
from quantkit.plan.plan import load_architecture
from quantkit.verify.classify_tensors import parts_of, scheme_of


@dataclass(frozen=True, kw_only=True)
class Input:
    """What feeds linears: a group, whose scale they were multiplied by if it was `rescaled`, and who absorbed that.

    readers: the dense ones of the group, or the one of an expert.
    """

    readers: tuple[str, ...]
    absorber: Absorber | None
    rescaled: bool


@dataclass(frozen=True)
class Sides:
    """Both checkpoints, with the manifest's words about each quantized module and block."""

    path: Path
    named: str  # the source, as whoever asked or the manifest calls it
    format: Format | None
    stored: Checkpoint
    source: Checkpoint
    layout: Layout
    modules: Mapping[str, Mapping[str, Any]]
    schemes: Mapping[str, Scheme]
    blocks: Mapping[str, Mapping[str, Any]]

    @cached_property
    def parts(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        """The stored tensors of each quantized module by local name."""
        return parts_of(self.schemes, self.stored.specs)

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """The stored tensors, as the model computes, that are not part of a quantized linear; their biases are."""
        packed = {
            f"{module}.{local}" for module, parts in self.parts.items() for local in parts if local != "bias"
        }  # fmt: skip
        return tuple(name for name in self.stored.specs if name not in packed)

    @cached_property
    def block_of(self) -> Mapping[str, Block]:
        """The block of each linear."""
        return {linear.name: block for block in self.layout.blocks for linear in block.linears}

    def tensors(self, module: str) -> dict[str, Tensor]:
        """A quantized linear's tensors as stored, by local name."""
        names = [f"{module}.{local}" for local in self.parts[module] if local != "bias"]
        return {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in self.stored.read(names).items()
        }

    def input_of(self, module: str) -> Input | None:
        """What feeds a linear; None where the architecture knows no group of it."""
        block = self.block_of.get(module)
        if block is None:
            return None
        experts, last = block.experts, module.rpartition(".")[2]
        if experts and module.startswith(f"{experts.module}."):
            if last == experts.down:
                up = f"{module.rpartition('.')[0]}.{experts.up}"
                return Input(
                    readers=(module,),
                    absorber=Absorber(module=up),
                    rescaled=self.told_rescaled(module),
                )
            group = next((group for group in block.groups if group.routed_experts), None)
        else:
            group = next((group for group in block.groups if module in group.readers), None)
        if group is None:
            return None
        return Input(
            readers=group.readers,
            absorber=group.absorber,
            rescaled=self.group_rescaled(block, group),
        )

    def readers_of(self, module: str) -> Iterable[Input]:
        """The rescaled inputs whose scale this module absorbed."""
        block = self.block_of.get(module) or self.block_with(module)
        if block is None:
            return ()
        found = [
            Input(readers=group.readers, absorber=group.absorber, rescaled=True)
            for group in block.groups
            if group.absorber
            and group.absorber.module == module
            and self.group_rescaled(block, group)
        ]
        experts = block.experts
        if (
            experts
            and module.startswith(f"{experts.module}.")
            and module.endswith(f".{experts.up}")
        ):
            down = f"{module.rpartition('.')[0]}.{experts.down}"
            if self.told_rescaled(down):
                found.append(
                    Input(readers=(down,), absorber=Absorber(module=module), rescaled=True)
                )
        return found

    def block_with(self, module: str) -> Block | None:
        """The block that holds a module which is no linear: a norm."""
        return next(
            (block for block in self.layout.blocks if module.startswith(f"{block.name}.")), None
        )

    def group_rescaled(self, block: Block, group: LinearGroup) -> bool:
        """Whether the build scaled the input of a group, by the manifest."""
        choices = self.blocks.get(block.name, {}).get("scales")
        told = (
            [choice for choice in choices if isinstance(choice, Mapping)]
            if isinstance(choices, list)
            else []
        )
        return any(
            choice.get("group") == group.name and choice.get("candidate") != 0 for choice in told
        )

    def told_rescaled(self, module: str) -> bool:
        """Whether the build scaled the input of a quantized linear, by the manifest."""
        return bool(self.modules.get(module, {}).get("rescaled"))

    def check_files(self, names: Iterable[str], told: Mapping[str, object]) -> int:
        """Hash the source's files that hold these tensors; how many. ArtifactError for one that changed."""
        wanted = set(names)
        files = {file for name, file in self.source.shards.files.items() if name in wanted}
        for file in sorted(files):
            if scan_file((self.source.folder / file).resolve()) != told.get(file):
                raise changed(self.path, self.named, f"{file} has other bytes")
        return len(files)


def changed(path: Path, named: str, what: str) -> ArtifactError:
    """The sentence for a source that is not what it was."""
    return ArtifactError(
        f"{named}: not the source that {path} was made of: {what}; --deep needs the source as it was, name its place "
        "with --source"
    )


def open_sides(path: Path, source: str | None) -> Sides:
    """Open an artifact that verifies, and its source; `source` names its place where the manifest's is not here.

    Raises ArtifactError for a source that changed, CheckpointError for one that cannot be read.
    """
    manifest = read_manifest(path)
    told = get_section(manifest, "source", path)
    model, revision = source or str(told.get("model")), None if source else told.get("revision")
    try:
        folder = hub.resolve_model(model, revision if isinstance(revision, str) else None).folder
    except (CheckpointError, UsageError) as fault:
        raise CheckpointError(
            f"{path}: its source {model} cannot be read, and --deep needs it: {fault}"
        ) from fault
    opened = Checkpoint.open(folder)
    if opened.fingerprint() != told.get("fingerprint"):
        raise changed(path, model, "its names, headers, config or tokenizer differ")
    modules: dict[str, Mapping[str, Any]] = {
        name: record
        for name, record in get_section(manifest, "modules", path).items()
        if isinstance(record, Mapping)
    }
    schemes = {
        name: scheme
        for name, record in modules.items()
        if (scheme := scheme_of(record.get("scheme")))
    }
    name = get_format_name(manifest)
    if schemes:
        registry.check_packages(str(name))
    blocks = {
        name: block for name, block in get_section(manifest, "blocks", path).items() if isinstance(block, Mapping)
    }  # fmt: skip
    return Sides(
        path=path,
        named=model,
        format=registry.get_format(str(name)) if schemes else None,
        stored=Checkpoint.open(path),
        source=opened,
        layout=load_architecture(opened.config).layout(opened.config),
        modules=modules,
        schemes=schemes,
        blocks=blocks,
    )
