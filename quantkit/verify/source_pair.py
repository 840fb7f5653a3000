"""An artifact and its source, opened together; a source that changed is refused."""

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
from quantkit.plan.left_out import LeftOut
from quantkit.plan.match_checkpoint import match_layout
from quantkit.plan.plan import load_architecture
from quantkit.verify.classify_tensors import group_by_module, parse_scheme


@dataclass(frozen=True, kw_only=True)
class LinearInput:
    """The input of linears: its readers, the module that absorbed its scale, whether it was scaled.

    readers: the dense linears of a group, or the one of an expert.
    """

    readers: tuple[str, ...]
    absorber: Absorber | None
    rescaled: bool


@dataclass(frozen=True)
class SourcePair:
    """Both checkpoints, with the manifest's entries of quantized modules and blocks."""

    path: Path
    source_name: str  # as on the command line or in the manifest
    format: Format | None
    stored: Checkpoint
    source: Checkpoint
    layout: Layout
    left_out: tuple[LeftOut, ...]  # tensors of the source that an artifact does not hold
    modules: Mapping[str, Mapping[str, Any]]
    schemes: Mapping[str, Scheme]
    blocks: Mapping[str, Mapping[str, Any]]

    @cached_property
    def parts(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        """The stored tensors of each quantized module by local name."""
        return group_by_module(self.schemes, self.stored.specs)

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """Names of the stored tensors outside quantized linears, and of the linears' biases."""
        packed = {
            f"{module}.{local}"
            for module, parts in self.parts.items()
            for local in parts
            if local != "bias"
        }
        return tuple(name for name in self.stored.specs if name not in packed)

    @cached_property
    def copied_tensors(self) -> frozenset[str]:
        """Names of the tensors of a wrapper's parts that text does not run through."""
        return frozenset(name for part in self.layout.parts for name in part.tensors)

    @cached_property
    def block_of(self) -> Mapping[str, Block]:
        """The block of each linear."""
        return {linear.name: block for block in self.layout.blocks for linear in block.linears}

    def read_tensors(self, module: str) -> dict[str, Tensor]:
        """Read a quantized linear's tensors as stored, by local name."""
        weight = f"{module}.weight"
        if weight in self.stored.logical.encoded:  # FP8 of the source, which `read` decodes
            tensors = self.stored.read_parts(weight)
        else:
            tensors = self.stored.read(
                f"{module}.{local}" for local in self.parts[module] if local != "bias"
            )
        return {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items()}

    def get_input(self, module: str) -> LinearInput | None:
        """Return the input of a linear; None if the architecture has no group for it."""
        block = self.block_of.get(module)
        if block is None:
            return None
        experts, last = block.experts, module.rpartition(".")[2]
        if experts and module.startswith(f"{experts.module}."):
            if last == experts.down:
                up = f"{module.rpartition('.')[0]}.{experts.up}"
                return LinearInput(
                    readers=(module,),
                    absorber=Absorber(module=up),
                    rescaled=self.is_rescaled(module),
                )
            group = next((group for group in block.groups if group.routed_experts), None)
        else:
            group = next((group for group in block.groups if module in group.readers), None)
        if group is None:
            return None
        return LinearInput(
            readers=group.readers,
            absorber=group.absorber,
            rescaled=self.is_group_rescaled(block, group),
        )

    def list_absorbed_inputs(self, module: str) -> Iterable[LinearInput]:
        """Return the scaled inputs whose scale this module absorbed."""
        block = self.block_of.get(module) or self.find_block(module)
        if block is None:
            return ()
        inputs = [
            LinearInput(readers=group.readers, absorber=group.absorber, rescaled=True)
            for group in block.groups
            if group.absorber
            and group.absorber.module == module
            and self.is_group_rescaled(block, group)
        ]
        experts = block.experts
        if (
            experts
            and module.startswith(f"{experts.module}.")
            and module.endswith(f".{experts.up}")
        ):
            down = f"{module.rpartition('.')[0]}.{experts.down}"
            if self.is_rescaled(down):
                inputs.append(
                    LinearInput(readers=(down,), absorber=Absorber(module=module), rescaled=True)
                )
        return inputs

    def find_block(self, module: str) -> Block | None:
        """Return the block of a module that is no linear, such as a norm."""
        return next(
            (block for block in self.layout.blocks if module.startswith(f"{block.name}.")), None
        )

    def is_group_rescaled(self, block: Block, group: LinearGroup) -> bool:
        """Return whether the build scaled the input of a group, by the manifest."""
        choices = self.blocks.get(block.name, {}).get("scales")
        entries = (
            [choice for choice in choices if isinstance(choice, Mapping)]
            if isinstance(choices, list)
            else []
        )
        return any(
            choice.get("group") == group.name and choice.get("candidate") != 0 for choice in entries
        )

    def is_rescaled(self, module: str) -> bool:
        """Return whether the build scaled the input of a quantized linear, by the manifest."""
        return bool(self.modules.get(module, {}).get("rescaled"))

    def hash_source_files(self, names: Iterable[str], source_hashes: Mapping[str, object]) -> int:
        """Hash the source files of these tensors and return their number.

        Raises ArtifactError for a changed file.
        """
        needed = set(names)
        files = {file for name, file in self.source.shards.files.items() if name in needed}
        for file in sorted(files):
            if scan_file((self.source.folder / file).resolve()) != source_hashes.get(file):
                raise make_changed_error(self.path, self.source_name, f"{file} has other bytes")
        return len(files)


def make_changed_error(path: Path, named: str, what: str) -> ArtifactError:
    """Return the error for a source that changed."""
    return ArtifactError(
        f"{named}: not the source that {path} was made of: {what}; --deep needs the source as it "
        "was, name its place with --source"
    )


def open_pair(path: Path, source: str | None) -> SourcePair:
    """Open a verified artifact and its source.

    source: its path, if the one in the manifest is not on this machine. Raises ArtifactError for a
    changed source, CheckpointError for an unreadable one.
    """
    manifest = read_manifest(path)
    source_entry = get_section(manifest, "source", path)
    model, revision = (
        source or str(source_entry.get("model")),
        None if source else source_entry.get("revision"),
    )
    try:
        folder = hub.resolve_model(model, revision if isinstance(revision, str) else None).folder
    except (CheckpointError, UsageError) as fault:
        raise CheckpointError(
            f"{path}: its source {model} cannot be read, and --deep needs it: {fault}"
        ) from fault
    source_checkpoint = Checkpoint.open(folder, decode=True)
    if source_checkpoint.compute_fingerprint() != source_entry.get("fingerprint"):
        raise make_changed_error(path, model, "its names, headers, config or tokenizer differ")
    modules: dict[str, Mapping[str, Any]] = {
        name: record
        for name, record in get_section(manifest, "modules", path).items()
        if isinstance(record, Mapping)
    }
    schemes = {
        name: scheme
        for name, record in modules.items()
        if (scheme := parse_scheme(record.get("scheme")))
    }
    name = get_format_name(manifest)
    if schemes:
        registry.check_packages(str(name))
    blocks = {
        name: block
        for name, block in get_section(manifest, "blocks", path).items()
        if isinstance(block, Mapping)
    }
    config = source_checkpoint.config
    architecture = load_architecture(config, source_checkpoint.specs)
    matched = match_layout(architecture, config, source_checkpoint.specs, model, drop_mtp=True)
    return SourcePair(
        path=path,
        source_name=model,
        format=registry.get_format(str(name)) if schemes else None,
        stored=Checkpoint.open(path).split_experts(matched.layout.blocks),
        source=source_checkpoint.split_experts(matched.layout.blocks),
        layout=architecture.layout(config),
        left_out=matched.left_out,
        modules=modules,
        schemes=schemes,
        blocks=blocks,
    )
