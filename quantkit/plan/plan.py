"""Recipe + headers -> everything a build will do, printable, before a weight is read; pure.

The plan names every output tensor, its shard, what each rule decided, the memory peak and the scratch disk. The same
recipe over the same source and versions gives the same plan, and `Plan.hash` says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from quantkit import registry
from quantkit.checkpoint.fp8_pairs import FP8
from quantkit.contracts import Architecture, Config, Format, Layout, Scheme, TensorSpec
from quantkit.errors import RecipeError
from quantkit.plan.decisions import (
    Decision,
    decide,
    fp8_faults,
    fused_faults,
    idle_rules,
    in_blocks,
    is_unscaled_for_fp8,
    rule_faults,
    storage_faults,
)
from quantkit.plan.match_checkpoint import (
    MatchedLayout,
    match_layout,
    read_fp8_block_size,
    stored_bytes,
)
from quantkit.plan.memory import MemoryPlan, memory_plan
from quantkit.plan.output_tensors import Kept, Shard, outputs, shards
from quantkit.recipe.parse import expand_preset
from quantkit.recipe.schema import Recipe, Rule


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """What is known of the source before weights are read. `specs` None: assumed from the published config."""

    model: str
    revision: str | None
    config: Config
    specs: Mapping[str, TensorSpec] | None
    fingerprint: str | None
    where: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a build needs to know; `build` adds nothing to it but data."""

    recipe: Recipe
    format_name: str  # one of the recipe's
    rules: tuple[Rule, ...]
    source: SourceFacts
    architecture: Architecture
    layout: Layout
    specs: Mapping[str, TensorSpec]  # logical source tensors
    dropped: tuple[str, ...]
    decisions: Mapping[str, Decision]
    shards: tuple[Shard, ...]
    memory: MemoryPlan
    warnings: tuple[str, ...]

    @cached_property  # asked for once per linear, 45,000 times for DeepSeek-V3
    def format(self) -> Format:
        return registry.get_format(self.format_name)

    @property
    def kept(self) -> Kept:
        """How what is not quantized is stored."""
        return Kept(
            specs=self.specs,
            scale=self.format.fp8_scale,
            side=read_fp8_block_size(self.source.config),
        )

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of each linear that is quantized, by module name."""
        return {
            name: decision.scheme
            for name, decision in self.decisions.items()
            if decision.scheme is not None
        }

    @property
    def parameters(self) -> int:
        """Elements of every source tensor that the plan reads."""
        return sum(spec.n_elements for spec in self.specs.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of the artifact's tensors."""
        return sum(shard.n_bytes for shard in self.shards)

    def source_bytes(self, names: Iterable[str] | None = None) -> int:
        """Bytes of these logical source tensors as stored, scales included; of all of them without names."""
        side = read_fp8_block_size(self.source.config)
        return sum(
            stored_bytes(self.specs[name], side)
            for name in (self.specs if names is None else names)
        )

    @property
    def path(self) -> str:
        """Where the artifact goes."""
        return self.recipe.path(self.format_name)

    @property
    def assumed(self) -> bool:
        """Whether the tensors were assumed from the published config instead of read from headers."""
        return self.source.specs is None

    @property
    def hash(self) -> str:
        """sha256 over what the recipe asks of the content, the source and the output tensors."""
        told = [self.recipe.hash, self.source.model, self.source.revision, self.source.fingerprint]
        outputs = [
            [s.file, [[t.name, t.dtype, list(t.shape)] for t in s.tensors]] for s in self.shards
        ]
        return hashlib.sha256(json.dumps([told, outputs], sort_keys=True).encode()).hexdigest()

    @property
    def needs_calibration(self) -> bool:
        """Whether any selected method learns from activations."""
        return needs_calibration(self.decisions)

    @property
    def needs_forward(self) -> bool:
        """Whether any stream runs through the blocks: for calibration, or for the fidelity figures."""
        return self.recipe.fidelity is not None or self.needs_calibration


def needs_calibration(decisions: Mapping[str, Decision]) -> bool:
    """Whether any selected method learns from activations."""
    used = {d.method for d in decisions.values() if d.method}
    return any(registry.get_method(name).needs_stats for name in used)


def load_architecture(config: Config) -> Architecture:
    """The table of the model's family, or what can be proven of a model without one.

    Raises UsageError for a model type that nobody knows, CheckpointError for one of which no table can be derived.
    """
    model_type = config.text("model_type")
    if model_type in registry.list_names("architectures"):
        return registry.get_architecture(model_type)
    from quantkit.models import (
        derive,
    )  # transformers takes seconds to start, which a plan by a table does without

    return derive.derive_architecture(config)


def match_source(source: SourceFacts) -> MatchedLayout:
    """What the source is made of: the same for every format, and for a family without a table seconds of proof.

    Raises as `architecture_of`, and CheckpointError when the tensors do not fit the architecture.
    """
    return match_layout(load_architecture(source.config), source.config, source.specs, source.where)


def rules_of(recipe: Recipe, architecture: Architecture) -> tuple[Rule, ...]:
    """The recipe's rules, or the preset its family calls for."""
    if recipe.rules is not None:
        return tuple(recipe.rules)
    return expand_preset(
        "experts-only" if architecture.experts_only else "all-linear", recipe.quantize
    )


def warnings_of(
    claimed: MatchedLayout,
    config: Config,
    recipe: Recipe,
    format_name: str,
    decisions: Mapping[str, Decision],
) -> list[str]:
    """What the user should know although the plan works."""
    told = list(claimed.warnings)
    if recipe.fidelity is None:
        told.append("fidelity: none: nobody will know what this artifact lost against its source")
    if claimed.dropped:
        told.append(
            f"{len(claimed.dropped)} tensors no engine reads are left out, e.g. {claimed.dropped[0]}"
        )
    if not any(decision.action == "quantize" for decision in decisions.values()):
        told.append("no linear is quantized: the artifact is a copy of the source")
    told += fp8_warnings(claimed, format_name, decisions)
    mtp = [b.name for b in claimed.layout.blocks if b.kind == "mtp"]
    if mtp and recipe.mtp == "quantize" and needs_calibration(decisions):
        told.append(
            f"{mtp[0]}: no forward pass reaches an MTP block, its linears are rounded to nearest (mtp-rtn)"
        )
    if not mtp and recipe.mtp != "keep":
        told.append(
            f"mtp: {recipe.mtp}: the model has no multi-token-prediction layer, and the key changes nothing"
        )
    engines: dict[str, list[str]] = {}
    for engine, why in find_unsupported_engines(
        registry.get_format(format_name), config, claimed.layout, decisions
    ).items():
        engines.setdefault(why, []).append(engine)
    return told + [f"{', '.join(names)}: {why}" for why, names in engines.items()]


def find_unsupported_engines(
    output: Format, config: Config, layout: Layout, decisions: Mapping[str, Decision]
) -> Mapping[str, str]:
    """Engines that cannot load what these decisions make of a model in this format, and why."""
    if output.limits is None:
        return {}
    aside = {
        linear.name for block in layout.blocks if block.kind == "mtp" for linear in block.linears
    }
    schemes = {d.linear: d.scheme for d in decisions.values() if d.scheme}
    kept = [d.linear for name, d in decisions.items() if d.action == "keep" and name not in aside]
    return output.limits(config.text("model_type"), schemes, kept) if schemes else {}


def fp8_warnings(
    claimed: MatchedLayout, format_name: str, decisions: Mapping[str, Decision]
) -> list[str]:
    """FP8 weights that become BF16 although nobody asked for it, and inputs that FP8 weights keep from being scaled."""
    told = []
    unasked = (
        f"{name}.weight"
        for name, d in decisions.items()
        if d.action == "keep" and d.keep == "source"
    )
    if any(claimed.specs[name].dtype == FP8 for name in unasked):
        told.append(f"format {format_name} cannot hold FP8 blocks: what is kept is stored as BF16")
    held = [
        group.name
        for block in claimed.layout.blocks
        for group in block.groups
        if is_unscaled_for_fp8(block, group, decisions)
    ]
    if held:
        told.append(
            f"{len(held)} inputs are not rescaled, because a linear that reads or makes them stays in FP8 blocks, e.g. "
            f"{held[0]}: keep: bf16 for such linears, or method gptq, loses less"
        )
    return told


def apply_rules(
    recipe: Recipe, source: SourceFacts, claimed: MatchedLayout, format_name: str
) -> tuple[tuple[Rule, ...], dict[str, Decision], list[str]]:
    """The rules, what they decide over every linear, and the recipe's faults that show by it."""
    output, rules, side = (
        registry.get_format(format_name),
        rules_of(recipe, claimed.architecture),
        read_fp8_block_size(source.config),
    )
    decisions = in_blocks(
        decide(claimed.layout, rules, recipe, claimed.specs), claimed.specs, output
    )
    refusing = find_unsupported_engines(output, source.config, claimed.layout, decisions)
    faults = rule_faults(rules, claimed.layout, recipe.name)
    faults += [
        f"{recipe.name}: {fault}" for fault in storage_faults(decisions, output, format_name)
    ]
    faults += [
        f"{recipe.name}: {fault}"
        for fault in fused_faults(claimed.layout, decisions, output, refusing)
    ]
    if side is not None:
        faults += [
            f"{recipe.name}: {fault}"
            for fault in fp8_faults(claimed.layout, decisions, output, side)
        ]
    return rules, decisions, faults


def list_written_tensors(
    source: SourceFacts, claimed: MatchedLayout, format_name: str, decisions: Mapping[str, Decision]
) -> list[TensorSpec]:
    """Every tensor of the artifact in writing order."""
    output = registry.get_format(format_name)
    kept = Kept(
        specs=claimed.specs, scale=output.fp8_scale, side=read_fp8_block_size(source.config)
    )
    return outputs(claimed.layout, decisions, kept, output)


def make_plan(
    recipe: Recipe,
    source: SourceFacts,
    claimed: MatchedLayout,
    format_name: str,
    *,
    budget_bytes: int,
    tokens: Mapping[Literal["calibration", "fidelity"], int],
    hidden_bytes: Literal[2, 4],
) -> Plan:
    """Decide everything about the artifact in one format.

    `claimed` is what `claimed_of` says of the source, `tokens` are the lengths of the streams, `hidden_bytes` the width
    of a hidden value on disk.

    Raises RecipeError with every fault of the recipe.
    """
    rules, decisions, faults = apply_rules(recipe, source, claimed, format_name)
    if needs_calibration(decisions) and recipe.calibration is None:
        faults.append(
            f"{recipe.where('calibration')}: calibration: method {recipe.quantize.method} needs a set, found none"
        )
    memory = memory_plan(
        claimed.layout,
        decisions,
        budget_bytes=budget_bytes,
        grams=needs_calibration(decisions) * (2 if recipe.propagate == "both" else 1),
        tokens=tokens,
        hidden_bytes=hidden_bytes,
    )
    if memory.needed_bytes > budget_bytes:
        faults.append(f"{recipe.where('memory')}: memory: {memory_fault(memory)}")
    if faults:
        raise RecipeError(faults)
    return Plan(
        recipe=recipe,
        format_name=format_name,
        rules=rules,
        source=source,
        architecture=claimed.architecture,
        layout=claimed.layout,
        specs=claimed.specs,
        dropped=claimed.dropped,
        decisions=decisions,
        shards=shards(
            list_written_tensors(source, claimed, format_name, decisions), recipe.output.shard_bytes
        ),
        memory=memory,
        warnings=(
            *warnings_of(claimed, source.config, recipe, format_name, decisions),
            *idle_rules(rules, decisions),
        ),
    )


def memory_fault(memory: MemoryPlan) -> str:
    """Why the budget is too small, part by part; what is needed is rounded up, so that it suffices as printed."""
    parts = {
        "base": memory.base_bytes,
        "block without experts": memory.dense_bytes,
        "one batch": memory.batch_bytes,
        "one expert": memory.expert_bytes,
        "head": memory.head_bytes,
    }
    told = ", ".join(f"{name} {n_bytes / 1e9:.2f}" for name, n_bytes in parts.items() if n_bytes)
    experts = "one expert" if memory.slice_experts == 1 else f"{memory.slice_experts} experts"
    smallest = f"the smallest wave ({experts})" if memory.expert_bytes else "the largest block"
    return (
        f"{smallest} needs {-(-memory.needed_bytes // 10**7) / 100:.2f} GB ({told}), found "
        f"{memory.budget_bytes // 10**7 / 100:.2f} GB; raise memory or free some"
    )
