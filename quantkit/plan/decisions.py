"""Decisions: the rule that applies to each linear, and all faults of the result. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from quantkit import registry
from quantkit.checkpoint.encoding import FP8, EncodedWeight
from quantkit.contracts import (
    PROTECTED_ROLES,
    Block,
    Format,
    Layout,
    Linear,
    LinearGroup,
    Rescale,
    ScaleDtype,
    Scheme,
    TensorSpec,
)
from quantkit.formats.common.engine_names import SERVERS
from quantkit.recipe.quantize import Quantize
from quantkit.recipe.schema import Recipe, Rule

NO_RULE = "no rule"
FP4_SCALES: Mapping[str, ScaleDtype] = {"mxfp4": "uint8", "nvfp4": "float8_e4m3fn"}
"""Scheme of FP4 -> dtype of its scales."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The treatment of one linear, and the rule that chose it."""

    linear: Linear
    block: str | None  # block name; None outside the blocks
    action: Literal["quantize", "keep", "drop"]
    rule: str
    # how a kept weight is stored; fp8: as the source's blocks; codes: as the source's codes
    keep: Literal["source", "bf16", "fp8", "codes"] = "source"
    codes: Scheme | None = None  # of a weight that keeps the source's codes
    decoded_from: str = ""  # the encoding of a kept weight whose codes the format does not hold
    encoding: str | None = None  # of experts whose stored tensors are copied in codes: "MXFP4 g32"
    method: str | None = None
    rounding: str | None = None
    scheme: Scheme | None = None
    shrinkage: float = 0.0  # of the gram with which codes are chosen

    @property
    def has_error_feedback(self) -> bool:
        """Whether the rounding propagates the error of a column to the next columns."""
        return self.rounding is not None and registry.get_rounding(self.rounding).needs_stats


def resolve_scale_dtype(quantize: Quantize, source_dtype: str) -> Literal["bfloat16", "float16"]:
    """Return the dtype of scales; `auto` is the source's.

    Engines compute in that dtype: they would cast another scale after the codes were chosen.
    """
    if quantize.scale_dtype != "auto":
        return quantize.scale_dtype
    return "float16" if source_dtype == "F16" else "bfloat16"


def make_scheme(quantize: Quantize, source_dtype: str) -> Scheme:
    """Return the Scheme of a recipe's `quantize`."""
    if quantize.method == "nf4":
        return Scheme(
            bits=quantize.bits,
            group_size=quantize.group_size,
            symmetric=quantize.symmetric,
            scale_dtype="float32",
            kind="nf4",
            double_quant=bool(quantize.double_quant),
            source_dtype="float32"
            if source_dtype == "F32"
            else resolve_scale_dtype(quantize, source_dtype),
        )
    own = FP4_SCALES.get(quantize.scheme)
    return Scheme(
        bits=quantize.bits,
        group_size=quantize.group_size,
        symmetric=quantize.symmetric,
        scale_dtype=own or resolve_scale_dtype(quantize, source_dtype),
        kind=quantize.scheme,
    )


def find_rule(rules: Sequence[Rule], linear: Linear) -> Rule | None:
    """Return the first rule that matches; quantize rules match protected linears only by name."""
    for rule in rules:
        protected = rule.quantize is not None and linear.role in PROTECTED_ROLES
        if rule.matches(linear.name) and (not protected or rule.names(linear.name)):
            return rule
    return None


def decide_linear(
    linear: Linear, block: Block | None, rules: Sequence[Rule], recipe: Recipe, dtype: str
) -> Decision:
    """Return the decision for one linear."""
    name, rule = block.name if block else None, find_rule(rules, linear)
    keep = rule.keep if rule and rule.keep else "source"
    if block and block.kind == "mtp" and recipe.mtp != "quantize":
        action: Literal["keep", "drop"] = "keep" if recipe.mtp == "keep" else "drop"
        return Decision(
            linear=linear, block=name, action=action, rule=f"mtp: {recipe.mtp}", keep=keep
        )
    if rule is None or rule.quantize is None:
        return Decision(
            linear=linear,
            block=name,
            action="keep",
            rule=rule.label if rule else NO_RULE,
            keep=keep,
        )
    return Decision(
        linear=linear,
        block=name,
        action="quantize",
        rule=rule.label,
        method=rule.quantize.method,
        rounding=rule.quantize.rounding,
        scheme=make_scheme(rule.quantize, dtype),
        shrinkage=recipe.calibration.shrinkage if recipe.calibration else 0.0,
    )


def decide_all(
    layout: Layout, rules: Sequence[Rule], recipe: Recipe, specs: Mapping[str, TensorSpec]
) -> dict[str, Decision]:
    """Return a decision for every linear by module name, in checkpoint order.

    `keep_fp8_blocks` then decides which kept weights stay FP8.
    """
    blocks: list[tuple[Block | None, Linear]] = [(None, layout.embedding)]
    blocks += [(block, linear) for block in layout.blocks for linear in block.linears]
    blocks += [(None, layout.head)] if layout.head else []
    return {
        linear.name: decide_linear(
            linear, block, rules, recipe, specs[f"{linear.name}.weight"].dtype
        )
        for block, linear in blocks
    }


def keep_fp8_blocks(
    decisions: Mapping[str, Decision], specs: Mapping[str, TensorSpec], output: Format
) -> dict[str, Decision]:
    """Return the decisions with keep "fp8" for kept FP8 weights, if the format can hold FP8 blocks.

    If nothing is quantized no weight stays FP8: the config of a format describes its codes first.
    """
    holds = output.fp8_scale is not None and any(
        decision.action == "quantize" for decision in decisions.values()
    )

    def stays(name: str, decision: Decision) -> bool:
        return (
            decision.action == "keep"
            and decision.keep == "source"
            and specs[f"{name}.weight"].dtype == FP8
        )

    return {n: replace(d, keep="fp8") if holds and stays(n, d) else d for n, d in decisions.items()}


def keep_codes(
    decisions: Mapping[str, Decision], schemes: Mapping[str, Scheme], output: Format
) -> dict[str, Decision]:
    """Return the decisions with keep "codes" for kept weights whose codes the format stores.

    schemes: of codes in the source, by module. If nothing is quantized no codes are kept.
    """
    copies = output.copies_codes
    if copies is None or not any(d.action == "quantize" for d in decisions.values()):
        return dict(decisions)

    def decide(name: str, decision: Decision) -> Decision:
        scheme = schemes.get(name)
        if scheme is None or (decision.action, decision.keep) != ("keep", "source"):
            return decision
        is_stored = copies(scheme, decision.linear)
        return replace(decision, keep="codes", codes=scheme) if is_stored else decision

    return {name: decide(name, decision) for name, decision in decisions.items()}


def copy_expert_codes(
    layout: Layout,
    decisions: Mapping[str, Decision],
    encoded: Mapping[str, EncodedWeight],
    output: Format,
) -> dict[str, Decision]:
    """Return the decisions with the encoding of kept experts whose stored tensors are copied.

    encoded: weights in codes, by name. If nothing is quantized no codes are kept.
    """
    result = dict(decisions)
    is_quantized = any(d.action == "quantize" for d in decisions.values())
    if output.copies_codes is None or not is_quantized:
        return result
    for block in layout.blocks:
        weights = [encoded.get(x.name) for x in block.stacked if x.kind == "weight"]
        labels = {x.label for x in weights if x is not None and x.is_copied}
        if not weights or not all(x is not None and x.is_copied for x in weights):
            continue
        for linear in filter(block.stores_together, block.linears):
            decision = decisions[linear.name]
            if (decision.action, decision.keep) == ("keep", "source"):
                result[linear.name] = replace(decision, encoding=", ".join(sorted(labels)))
    return result


def keeps_stacked(block: Block, decisions: Mapping[str, Decision]) -> bool:
    """Return whether an artifact stores the experts of a block as the checkpoint does: together."""
    if not block.stacked or block.experts is None:
        return False
    return decisions[block.experts.first].action == "keep"


def changes_kept_bits(block: Block, group: LinearGroup, decisions: Mapping[str, Decision]) -> bool:
    """Return whether rescaling a group would change a reader or absorber whose stored bits are
    kept: FP8 blocks, codes, or tensors with all experts.
    """
    absorber = (group.absorber.module,) if group.absorber else ()
    experts = (block.experts.first,) if block.experts and group.routed_experts else ()
    if experts and keeps_stacked(block, decisions):
        return True
    names = (*group.readers, *absorber, *experts)
    return any(name in decisions and decisions[name].keep in ("fp8", "codes") for name in names)


def select_quantized_groups(
    block: Block, decisions: Mapping[str, Decision]
) -> dict[str, LinearGroup]:
    """Return the groups with a quantized reader, routed experts included: they need grams."""
    gate = block.experts.first if block.experts else ""

    def read(group: LinearGroup) -> bool:
        readers = (*group.readers, gate) if group.routed_experts and gate else group.readers
        return any(decisions[reader].action == "quantize" for reader in readers)

    return {group.name: group for group in block.groups if read(group)}


def find_rescale(
    block: Block, group: LinearGroup, decisions: Mapping[str, Decision]
) -> Rescale | None:
    """Return the scale search of the method that quantizes the readers of a group.

    None if several methods do, if no module absorbs the scale, or in an MTP block, whose inputs are
    unknown. Routed experts count as readers.
    """
    experts = block.experts
    names = [
        *group.readers,
        *([experts.first] if group.routed_experts and experts else []),
    ]
    used = {method for reader in names if (method := decisions[reader].method)}
    if block.kind == "mtp" or group.absorber is None or len(used) != 1:
        return None
    return registry.get_method(used.pop()).rescale


def is_unscaled_for_kept_bits(
    block: Block, group: LinearGroup, decisions: Mapping[str, Decision]
) -> bool:
    """Return whether the input of a group is not rescaled only because stored bits are kept."""
    is_searched = find_rescale(block, group, decisions) is not None
    return is_searched and changes_kept_bits(block, group, decisions)


def find_unmatched_rules(rules: Sequence[Rule], layout: Layout, where: str) -> list[str]:
    """Return a fault for each rule that matches no linear: most likely a typing error."""
    linears = layout.linears
    return [
        f"{where}:{rule.line}: {rule.label}: {rule.match!r} matches no linear of this model; "
        f"expected a glob or re:regex over names like {linears[1].name!r}"
        for rule in rules
        if not rule.optional and not any(rule.matches(linear.name) for linear in linears)
    ]


def find_idle_rules(rules: Sequence[Rule], decisions: Mapping[str, Decision]) -> list[str]:
    """Return a warning for each rule that matches linears but applies to none of them."""
    deciding = {decision.rule for decision in decisions.values()}
    return [
        f"{rule.label}: {rule.match!r} applies to no linear: an earlier rule or mtp applies to "
        "all that it matches, or they are routers, embeddings or heads, which a rule quantizes "
        "only by name"
        for rule in rules
        if not rule.optional
        and rule.label not in deciding
        and any(rule.matches(name) for name in decisions)
    ]


def find_storage_faults(
    decisions: Mapping[str, Decision], output: Format, format_name: str
) -> list[str]:
    """Return faults, one per reason, for linears or mixed schemes that the format cannot hold."""
    reasons: dict[str, list[str]] = {}
    schemes: dict[Scheme, Decision] = {}
    for decision in decisions.values():
        if decision.scheme is None:
            continue
        schemes.setdefault(decision.scheme, decision)
        reason = (
            find_outside_fault(decision)
            or find_group_size_fault(decision)
            or output.accepts(decision.scheme, decision.linear)
        )
        if reason:
            reasons.setdefault(f"{decision.rule}: {reason}", []).append(decision.linear.name)
    faults = format_reasons(reasons)
    if output.one_scheme and len(schemes) > 1:
        examples = ", ".join(
            f"{d.linear.name} ({format_difference(s, schemes)})" for s, d in schemes.items()
        )
        others = (
            ", or format compressed_tensors or gptq"
            if all(scheme.kind == "int" for scheme in schemes)
            else ""
        )
        faults.append(
            f"format {format_name} holds one scheme per artifact, found {len(schemes)}: "
            f"{examples}; use one for all rules{others}"
        )
    return faults


def format_difference(scheme: Scheme, among: Iterable[Scheme]) -> str:
    """Return the keys in which a scheme differs from others: "bits: 4, double_quant: false"."""
    schemes = list(among)
    names = [
        field.name
        for field in fields(Scheme)
        if len({getattr(other, field.name) for other in schemes}) > 1
    ]
    return ", ".join(f"{name}: {str(getattr(scheme, name)).lower()}" for name in names)


def find_fp8_faults(
    layout: Layout, decisions: Mapping[str, Decision], output: Format, side: int
) -> list[str]:
    """Return faults, one per reason, for linears that cannot stay in FP8 blocks of `side`."""
    reasons: dict[str, list[str]] = {}
    for block in (block for block in layout.blocks if block.kind == "decoder"):
        for linear in (linear for linear in block.linears if decisions[linear.name].keep == "fp8"):
            reason = output.accepts_fp8(linear, side) if output.accepts_fp8 else None
            if reason:
                reasons.setdefault(f"{decisions[linear.name].rule}: {reason}", []).append(
                    linear.name
                )
    for block in layout.blocks:
        rows = {
            linear.name: linear.out_features
            for linear in block.linears
            if linear.role != "routed_expert"
        }
        for name in (
            name for members in block.fused for name in members[:-1] if rows.get(name, 0) % side
        ):
            if decisions[name].keep == "fp8":
                reason = (
                    f"vLLM and SGLang merge this linear with others when loading; expected a "
                    f"multiple of {side} rows (the FP8 block), found {rows[name]}; use keep: bf16 "
                    "for them"
                )
                reasons.setdefault(f"{decisions[name].rule}: {reason}", []).append(name)
    return format_reasons(reasons)


def format_reasons(reasons: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one sentence per reason, with its first module and the number of others."""
    return [
        f"{reason} ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")")
        for reason, names in reasons.items()
    ]


def find_outside_fault(decision: Decision) -> str | None:
    """Return a fault for a quantized linear outside the blocks: an embedding or a head."""
    if decision.block is not None:
        return None
    return f"the build quantizes inside blocks only, found the {decision.linear.role}; keep it"


def find_group_size_fault(decision: Decision) -> str | None:
    """Return a fault for a group size that does not divide the row, with sizes that do."""
    scheme, width = decision.scheme, decision.linear.in_features
    if scheme is None or scheme.group_size == -1 or width % scheme.group_size == 0:
        return None
    fitting = [size for size in (128, 64, 32) if width % size == 0 and scheme.kind == "int"]
    use = f"use {' or '.join(map(str, fitting))}" if fitting else "keep this linear"
    return f"group_size {scheme.group_size} does not divide {width} input features; {use}"


def find_fused_faults(
    layout: Layout, decisions: Mapping[str, Decision], output: Format, refusing: Collection[str]
) -> list[str]:
    """Return faults for linears that engines merge at load but that have different decisions.

    `refusing` are engines that cannot load the artifact. The routed experts of a block need one
    scheme for any engine: a build quantizes them together.
    """
    merging = (
        []
        if output.ordinary
        else [name for name in SERVERS if name in output.engines and name not in refusing]
    )
    faults = []
    for block in layout.blocks:
        routed = block.experts.first if block.experts else None
        for members in block.fused:
            if not merging and routed not in members:
                continue
            outcomes: dict[tuple[str, Scheme | None], str] = {}
            for name in members:
                decision = decisions[name]
                kept = {"fp8": " in FP8", "codes": " in codes"}.get(decision.keep, "")
                action = decision.action + kept
                if decision.scheme is not None and decision.scheme.kind == "nvfp4":
                    # solved together, they get the one global scale that engines expect
                    action = f"{action} by {decision.method}, {decision.rounding}"
                outcomes.setdefault((action, decision.scheme or decision.codes), name)
            if len(outcomes) > 1:
                members_text = ", ".join(
                    f"{name} ({decisions[name].rule}: {action})"
                    for (action, _), name in outcomes.items()
                )
                verb = "merges" if len(merging) == 1 else "merge"
                loads = f"{' and '.join(merging)} {verb} these linears when loading"
                why = (
                    loads
                    if merging
                    else "quantkit quantizes and loads the routed experts of a block together"
                )
                faults.append(
                    f"{block.name}: {why}, so they need one decision, found {len(outcomes)}: "
                    f"{members_text}"
                )
    return faults
