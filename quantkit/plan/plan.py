"""The plan of a build, made from recipe and headers before any weight is read. Pure.

It lists every output tensor and its shard, the decision of every rule, the memory peak and the
scratch disk. The same recipe, source and versions give the same plan, identified by `Plan.hash`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from quantkit import registry
from quantkit.checkpoint.encoding import FP8, EncodedWeight
from quantkit.checkpoint.stacked import ExpertPart, find_expert_parts
from quantkit.contracts import Architecture, Config, Format, Layout, Scheme, TensorSpec
from quantkit.errors import RecipeError
from quantkit.plan.decisions import (
    Decision,
    copy_expert_codes,
    decide_all,
    find_fp8_faults,
    find_fused_faults,
    find_idle_rules,
    find_storage_faults,
    find_unmatched_rules,
    is_unscaled_for_kept_bits,
    keep_codes,
    keep_fp8_blocks,
)
from quantkit.plan.decoded import describe_decoded, mark_decoded
from quantkit.plan.derive_once import DerivationKey, derive_once
from quantkit.plan.engine_limits import find_unsupported_engines
from quantkit.plan.left_out import LeftOut, summarize_left_out
from quantkit.plan.match_checkpoint import (
    MatchedLayout,
    compute_stored_bytes,
    match_layout,
    read_fp8_block_size,
)
from quantkit.plan.memory import MemoryPlan, plan_memory
from quantkit.plan.output_tensors import KeptStorage, Shard, list_output_tensors, split_into_shards
from quantkit.plan.plan_schema import PlanText
from quantkit.recipe.parse import expand_preset
from quantkit.recipe.schema import Recipe, Rule

Propagation = Literal["quantized", "original", "both"]
TextUse = Literal["calibration", "fidelity"]


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """The source before weights are read. `specs` None: assumed from the published config.

    `code`: the Python files that the artifact carries over; None if they are not on this machine.
    `folder`: the weights, if they are on this machine. `encoded`: weights that are stored in codes.
    `notes`: differences from the files that transformers reads, and remarks on the headers.
    """

    model: str
    revision: str | None
    config: Config
    specs: Mapping[str, TensorSpec] | None
    fingerprint: str | None
    where: str
    code: tuple[str, ...] | None = None
    folder: Path | None = None
    encoded: Mapping[str, EncodedWeight] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property  # read once per linear
    def fp8_side(self) -> int | None:
        """Side of the source's FP8 blocks; None without any."""
        sides = (weight.block[0] for weight in self.encoded.values() if weight.block)
        return next(sides, None) or read_fp8_block_size(self.config)

    @property
    def code_schemes(self) -> dict[str, Scheme]:
        """Schemes of weights whose integer codes an artifact may hold unchanged, by module."""
        return {
            name.removesuffix(".weight"): weight.scheme
            for name, weight in self.encoded.items()
            if weight.scheme is not None
        }

    def count_bytes(self, spec: TensorSpec, part: ExpertPart | None = None) -> int:
        """Return the stored bytes of a logical tensor, with scales.

        part: where it lies in a stored tensor with all experts.
        """
        if weight := self.encoded.get(part.stacked.name if part else spec.name):
            return weight.n_bytes * spec.n_elements // weight.spec.n_elements
        return compute_stored_bytes(spec, self.fp8_side)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All decisions of a build; `build` adds data only."""

    recipe: Recipe
    format_name: str  # one of the recipe's
    rules: tuple[Rule, ...]
    source: SourceFacts
    architecture: Architecture
    layout: Layout
    specs: Mapping[str, TensorSpec]  # logical source tensors
    left_out: tuple[LeftOut, ...]
    decisions: Mapping[str, Decision]
    shards: tuple[Shard, ...]
    memory: MemoryPlan
    warnings: tuple[str, ...]
    texts: tuple[PlanText, ...] = ()
    tokens: Mapping[TextUse, int] = field(default_factory=dict)  # of the streams; upper bounds
    text_tokens: Mapping[TextUse, int] = field(default_factory=dict)  # counted, without solutions

    @cached_property  # read once per linear, 45,000 times for DeepSeek-V3
    def format(self) -> Format:
        return registry.get_format(self.format_name)

    @property
    def kept(self) -> KeptStorage:
        """Storage of weights that are not quantized."""
        return KeptStorage(
            specs=self.specs,
            scale=self.format.fp8_scale,
            side=self.source.fp8_side,
            output=self.format,
            encoded=self.source.encoded,
        )

    @cached_property
    def fp8_parts(self) -> tuple[str, ...]:
        """Modules of copied parts whose weights stay in FP8 blocks."""
        names = (name for part in self.layout.parts for name in part.tensors)
        if not self.schemes:
            return ()
        copied = (name for name in names if self.kept.copies_fp8(self.specs[name]))
        return tuple(name.removesuffix(".weight") for name in copied)

    @property
    def decoded_parts(self) -> tuple[str, ...]:
        """Weights of copied parts in codes that the format does not hold."""
        names = (name for part in self.layout.parts for name in part.tensors)
        kept = {f"{module}.weight" for module in self.fp8_parts}
        return tuple(name for name in names if name in self.source.encoded and name not in kept)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Scheme of each linear in codes by module name: quantized, or kept as in the source."""
        return {
            name: scheme
            for name, decision in self.decisions.items()
            if (scheme := decision.scheme or decision.codes) is not None
        }

    @property
    def parameters(self) -> int:
        """Number of elements of all source tensors in the plan."""
        return sum(spec.n_elements for spec in self.specs.values())

    @property
    def n_bytes(self) -> int:
        """Bytes of the artifact's tensors."""
        return sum(shard.n_bytes for shard in self.shards)

    def source_bytes(self, names: Iterable[str] | None = None) -> int:
        """Return the bytes of some (default: all) logical source tensors as stored, with scales."""
        return sum(
            self.source.count_bytes(self.specs[name], self.expert_parts.get(name))
            for name in (self.specs if names is None else names)
        )

    @cached_property  # read once per linear
    def expert_parts(self) -> Mapping[str, ExpertPart]:
        """Where tensors of experts lie in stored tensors with all of them, by name."""
        return find_expert_parts(self.layout.blocks)

    @property
    def path(self) -> str:
        """Path of the artifact."""
        return self.recipe.path(self.format_name)

    @property
    def is_assumed(self) -> bool:
        """Whether tensors are assumed from the published config instead of read from headers."""
        return self.source.specs is None

    @property
    def hash(self) -> str:
        """sha256 over the recipe's hash, the source and the output tensors."""
        identity = [
            self.recipe.hash,
            self.source.model,
            self.source.revision,
            self.source.fingerprint,
        ]
        outputs = [
            [s.file, [[t.name, t.dtype, list(t.shape)] for t in s.tensors]] for s in self.shards
        ]
        return hashlib.sha256(json.dumps([identity, outputs], sort_keys=True).encode()).hexdigest()

    @cached_property  # read once per block
    def propagation(self) -> Propagation:
        """The weights that carry calibration text to the next block."""
        return resolve_propagation(self.recipe, self.layout)

    @property
    def needs_calibration(self) -> bool:
        """Whether any selected method needs statistics of activations."""
        return needs_calibration(self.decisions)

    @property
    def needs_forward(self) -> bool:
        """Whether any text runs through the blocks: for calibration or for the fidelity figures."""
        return self.recipe.fidelity is not None or self.needs_calibration


def resolve_propagation(recipe: Recipe, layout: Layout) -> Propagation:
    """Return the recipe's `propagate`; `auto` is the value that measured best.

    Dense models: `both`. Routed experts: `quantized`, since `both` changed nothing that could be
    resolved (numerics/README.md).
    """
    if recipe.propagate != "auto":
        return recipe.propagate
    return "quantized" if any(block.experts for block in layout.blocks) else "both"


def needs_calibration(decisions: Mapping[str, Decision]) -> bool:
    """Whether any selected method needs statistics of activations."""
    used = {d.method for d in decisions.values() if d.method}
    return any(registry.get_method(name).needs_stats for name in used)


def load_architecture(config: Config, names: Collection[str] = ()) -> Architecture:
    """Return the architecture of a model type: a table of quantkit, or derived from transformers.

    names: those of the checkpoint's tensors; without them those that transformers saves.

    Raises UsageError for an unknown model type, CheckpointError if no table can be derived.
    """
    model_type = registry.resolve_model_type(config.text("model_type"))
    if model_type in registry.list_names("architectures"):
        return registry.get_architecture(model_type)
    return derive_once(DerivationKey(config=config, names=tuple(names)))


def match_source(source: SourceFacts, *, drop_mtp: bool = False) -> MatchedLayout:
    """Match the source with its architecture; the result is the same for every format.

    Takes seconds for a family without a table. drop_mtp: the recipe drops MTP blocks. Raises like
    `load_architecture`, and CheckpointError if the tensors do not match the architecture.
    """
    architecture = load_architecture(source.config, source.specs or ())
    return match_layout(architecture, source.config, source.specs, source.where, drop_mtp=drop_mtp)


def resolve_rules(recipe: Recipe, architecture: Architecture) -> tuple[Rule, ...]:
    """Return the recipe's rules, or the default preset of the architecture."""
    if recipe.rules is not None:
        return tuple(recipe.rules)
    return expand_preset(
        "experts-only" if architecture.experts_only else "all-linear", recipe.quantize
    )


def collect_warnings(
    matched: MatchedLayout,
    source: SourceFacts,
    recipe: Recipe,
    format_name: str,
    decisions: Mapping[str, Decision],
) -> list[str]:
    """Return the warnings of a plan."""
    warnings = [*recipe.conversions, *matched.warnings]
    if recipe.fidelity is None:
        warnings.append(
            "fidelity: none: the loss of this artifact against its source will not be measured"
        )
    warnings += summarize_left_out(matched.left_out)
    if not any(decision.action == "quantize" for decision in decisions.values()):
        warnings.append("no linear is quantized: the artifact is a copy of the source")
    warnings += describe_decoded(matched.layout, source.encoded, decisions, format_name)
    warnings += find_fp8_warnings(matched, format_name, decisions)
    mtp = [b.name for b in matched.layout.blocks if b.kind == "mtp"]
    if mtp and recipe.mtp == "quantize" and needs_calibration(decisions):
        warnings.append(
            f"{mtp[0]}: no forward pass reaches an MTP block, its linears are rounded to nearest "
            "(mtp-rtn)"
        )
    if not mtp and recipe.mtp != "keep":
        warnings.append(
            f"mtp: {recipe.mtp}: the model has no multi-token-prediction layer; the key has no "
            "effect"
        )
    engines: dict[str, list[str]] = {}
    for engine, why in find_unsupported_engines(
        registry.get_format(format_name), source.config, matched.layout, decisions
    ).items():
        engines.setdefault(why, []).append(engine)
    return warnings + [f"{', '.join(names)}: {why}" for why, names in engines.items()]


def find_fp8_warnings(
    matched: MatchedLayout, format_name: str, decisions: Mapping[str, Decision]
) -> list[str]:
    """Return warnings for FP8 weights that become BF16, and for inputs that are not rescaled, so
    that stored bits are kept.
    """
    warnings = []
    kept_as_source = (
        f"{name}.weight"
        for name, d in decisions.items()
        if d.action == "keep" and d.keep == "source"
    )
    if any(matched.specs[name].dtype == FP8 for name in kept_as_source):
        warnings.append(
            f"format {format_name} cannot hold FP8 blocks: kept weights are stored as BF16"
        )
    unscaled = [
        group.name
        for block in matched.layout.blocks
        for group in block.groups
        if is_unscaled_for_kept_bits(block, group, decisions)
    ]
    if unscaled:
        warnings.append(
            f"{len(unscaled)} inputs are not rescaled, because a linear that reads or produces "
            f"them keeps its stored bits, e.g. {unscaled[0]}: keep: bf16 for such linears, or "
            "method gptq, loses less"
        )
    return warnings


def apply_rules(
    recipe: Recipe, source: SourceFacts, matched: MatchedLayout, format_name: str
) -> tuple[tuple[Rule, ...], dict[str, Decision], list[str]]:
    """Return the rules, the decision for every linear, and the faults of the rules."""
    output, rules, side = (
        registry.get_format(format_name),
        resolve_rules(recipe, matched.architecture),
        source.fp8_side,
    )
    decisions = keep_fp8_blocks(
        decide_all(matched.layout, rules, recipe, matched.specs), matched.specs, output
    )
    decisions = keep_codes(decisions, source.code_schemes, output)
    decisions = mark_decoded(decisions, source.encoded)
    decisions = copy_expert_codes(matched.layout, decisions, source.encoded, output)
    refusing = find_unsupported_engines(output, source.config, matched.layout, decisions)
    faults = find_unmatched_rules(rules, matched.layout, recipe.name)
    faults += [
        f"{recipe.name}: {fault}" for fault in find_storage_faults(decisions, output, format_name)
    ]
    faults += [
        f"{recipe.name}: {fault}"
        for fault in find_fused_faults(matched.layout, decisions, output, refusing)
    ]
    if side is not None:
        faults += [
            f"{recipe.name}: {fault}"
            for fault in find_fp8_faults(matched.layout, decisions, output, side)
        ]
    return rules, decisions, faults


def list_written_tensors(
    source: SourceFacts, matched: MatchedLayout, format_name: str, decisions: Mapping[str, Decision]
) -> list[TensorSpec]:
    """Return every tensor of the artifact in writing order."""
    output = registry.get_format(format_name)
    kept = KeptStorage(
        specs=matched.specs,
        scale=output.fp8_scale,
        side=source.fp8_side,
        output=output,
        encoded=source.encoded,
    )
    return list_output_tensors(matched.layout, decisions, kept, output)


def make_plan(
    recipe: Recipe,
    source: SourceFacts,
    matched: MatchedLayout,
    format_name: str,
    *,
    budget_bytes: int,
    tokens: Mapping[Literal["calibration", "fidelity"], int],
    hidden_bytes: Literal[2, 4],
) -> Plan:
    """Make the plan of the artifact in one format; raises RecipeError with every fault.

    Args:
        matched: the result of `match_source`.
        budget_bytes: host memory that the build may use.
        tokens: lengths of the streams.
        hidden_bytes: bytes of a hidden value on disk.
    """
    rules, decisions, faults = apply_rules(recipe, source, matched, format_name)
    if needs_calibration(decisions) and recipe.calibration is None:
        faults.append(
            f"{recipe.where('calibration')}: calibration: method {recipe.quantize.method} needs a "
            "set, found none"
        )
    memory = plan_build_memory(
        recipe,
        matched.layout,
        decisions,
        budget_bytes=budget_bytes,
        tokens=tokens,
        hidden_bytes=hidden_bytes,
    )
    if memory.needed_bytes > budget_bytes:
        faults.append(f"{recipe.where('memory')}: memory: {format_memory_fault(memory)}")
    if faults:
        raise RecipeError(faults)
    return Plan(
        recipe=recipe,
        format_name=format_name,
        rules=rules,
        source=source,
        architecture=matched.architecture,
        layout=matched.layout,
        specs=matched.specs,
        left_out=matched.left_out,
        decisions=decisions,
        shards=split_into_shards(
            list_written_tensors(source, matched, format_name, decisions), recipe.output.shard_bytes
        ),
        memory=memory,
        tokens=dict(tokens),
        warnings=(
            *collect_warnings(matched, source, recipe, format_name, decisions),
            *find_idle_rules(rules, decisions),
        ),
    )


def plan_build_memory(
    recipe: Recipe,
    layout: Layout,
    decisions: Mapping[str, Decision],
    *,
    budget_bytes: int,
    tokens: Mapping[TextUse, int],
    hidden_bytes: Literal[2, 4],
) -> MemoryPlan:
    """Return the memory of a build of these decisions; tokens: lengths of the streams."""
    copies = 2 if resolve_propagation(recipe, layout) == "both" else 1
    return plan_memory(
        layout,
        decisions,
        budget_bytes=budget_bytes,
        grams=needs_calibration(decisions) * copies,
        tokens=tokens,
        hidden_bytes=hidden_bytes,
        longest=find_longest_text(recipe, decisions),
        yardstick=bool(recipe.fidelity and recipe.fidelity.yardstick),
    )


def find_longest_text(recipe: Recipe, decisions: Mapping[str, Decision]) -> int:
    """Return the tokens of the longest sequence that runs through the model."""
    calibration = recipe.calibration if needs_calibration(decisions) else None
    return max((text.length for text in (calibration, recipe.fidelity) if text), default=0)


def format_memory_fault(memory: MemoryPlan) -> str:
    """Return the message for a budget that is too small, with its parts.

    The bytes needed are rounded up, so that the printed number suffices.
    """
    parts = {
        "base": memory.base_bytes,
        "block without experts": memory.dense_bytes,
        "one batch": memory.batch_bytes,
        "one expert": memory.expert_bytes,
        "head": memory.head_bytes,
    }
    parts_text = ", ".join(
        f"{name} {n_bytes / 1e9:.2f}" for name, n_bytes in parts.items() if n_bytes
    )
    experts = "one expert" if memory.slice_experts == 1 else f"{memory.slice_experts} experts"
    smallest = f"the smallest wave ({experts})" if memory.expert_bytes else "the largest block"
    return (
        f"{smallest} needs {-(-memory.needed_bytes // 10**7) / 100:.2f} GB ({parts_text}), found "
        f"{memory.budget_bytes // 10**7 / 100:.2f} GB; raise memory or free some"
    )
