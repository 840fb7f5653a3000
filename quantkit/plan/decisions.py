"""Which rule decides over which linear, and what is wrong with the outcome; pure, all faults collected."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from quantkit import registry
from quantkit.checkpoint.fp8_pairs import FP8
from quantkit.contracts import (
    PROTECTED_ROLES,
    Block,
    Format,
    Layout,
    Linear,
    LinearGroup,
    Rescale,
    Scheme,
    TensorSpec,
)
from quantkit.formats.common.engine_names import SERVERS
from quantkit.recipe.schema import Quantize, Recipe, Rule

NO_RULE = "no rule"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What happens to one linear, and which rule says so."""

    linear: Linear
    block: str | None  # block name; None outside the blocks
    action: Literal["quantize", "keep", "drop"]
    rule: str
    keep: Literal["source", "bf16", "fp8"] = (
        "source"  # how a kept weight is stored; fp8: as the source's blocks
    )
    method: str | None = None
    rounding: str | None = None
    scheme: Scheme | None = None

    @property
    def feeds_back(self) -> bool:
        """Whether rounding errors move on from column to column."""
        return self.rounding is not None and registry.get_rounding(self.rounding).needs_stats


def scale_dtype(quantize: Quantize, source_dtype: str) -> Literal["bfloat16", "float16"]:
    """`auto` follows the source: engines compute in its dtype and would cast another scale after the codes are set."""
    if quantize.scale_dtype != "auto":
        return quantize.scale_dtype
    return "float16" if source_dtype == "F16" else "bfloat16"


def make_scheme(quantize: Quantize, source_dtype: str) -> Scheme:
    """The recipe's words as a Scheme."""
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
            else scale_dtype(quantize, source_dtype),
        )
    return Scheme(
        bits=quantize.bits,
        group_size=quantize.group_size,
        symmetric=quantize.symmetric,
        scale_dtype=scale_dtype(quantize, source_dtype),
    )


def first_match(rules: Sequence[Rule], linear: Linear) -> Rule | None:
    """The first rule that matches; a quantize rule reaches protected linears only by naming them."""
    for rule in rules:
        protected = rule.quantize is not None and linear.role in PROTECTED_ROLES
        if rule.matches(linear.name) and (not protected or rule.names(linear.name)):
            return rule
    return None


def decide_one(
    linear: Linear, block: Block | None, rules: Sequence[Rule], recipe: Recipe, dtype: str
) -> Decision:
    """The decision over one linear."""
    name, rule = block.name if block else None, first_match(rules, linear)
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
    )


def decide(
    layout: Layout, rules: Sequence[Rule], recipe: Recipe, specs: Mapping[str, TensorSpec]
) -> dict[str, Decision]:
    """A decision for every linear of the model, by module name, in checkpoint order; `in_blocks` has the last word."""
    blocks: list[tuple[Block | None, Linear]] = [(None, layout.embedding)]
    blocks += [(block, linear) for block in layout.blocks for linear in block.linears]
    blocks += [(None, layout.head)] if layout.head else []
    return {
        linear.name: decide_one(linear, block, rules, recipe, specs[f"{linear.name}.weight"].dtype)
        for block, linear in blocks
    }


def in_blocks(
    decisions: Mapping[str, Decision], specs: Mapping[str, TensorSpec], output: Format
) -> dict[str, Decision]:
    """The decisions with keep "fp8" for weights that lie in FP8 blocks and may stay so in a format that holds them.

    In an artifact where nothing is quantized nothing stays: a format's config describes its codes first.
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


def touches_fp8(group: LinearGroup, decisions: Mapping[str, Decision]) -> bool:
    """Whether rescaling a group would change bits that are kept: those of a reader, or of what makes its input."""
    absorber = (group.absorber.module,) if group.absorber else ()
    names = (*group.readers, *absorber)
    return any(name in decisions and decisions[name].keep == "fp8" for name in names)


def select_quantized_groups(
    block: Block, decisions: Mapping[str, Decision]
) -> dict[str, LinearGroup]:
    """Groups with a reader, routed experts included, that is quantized: their grams are needed."""
    gate = block.experts.linear(0, block.experts.gate) if block.experts else ""

    def read(group: LinearGroup) -> bool:
        readers = (*group.readers, gate) if group.routed_experts and gate else group.readers
        return any(decisions[reader].action == "quantize" for reader in readers)

    return {group.name: group for group in block.groups if read(group)}


def find_rescale(
    block: Block, group: LinearGroup, decisions: Mapping[str, Decision]
) -> Rescale | None:
    """The scale search of the one method that quantizes the readers of a group, routed experts included.

    None when several methods do, when nothing absorbs the scale, or in an MTP block, whose inputs nobody sees.
    """
    experts = block.experts
    names = [
        *group.readers,
        *([experts.linear(0, experts.gate)] if group.routed_experts and experts else []),
    ]
    used = {method for reader in names if (method := decisions[reader].method)}
    if block.kind == "mtp" or group.absorber is None or len(used) != 1:
        return None
    return registry.get_method(used.pop()).rescale


def is_unscaled_for_fp8(
    block: Block, group: LinearGroup, decisions: Mapping[str, Decision]
) -> bool:
    """Whether the input of a group keeps its scale only because kept FP8 bits would have to change with it."""
    return find_rescale(block, group, decisions) is not None and touches_fp8(group, decisions)


def rule_faults(rules: Sequence[Rule], layout: Layout, where: str) -> list[str]:
    """Rules that match no linear: most likely a typing error in the pattern."""
    linears = layout.linears
    return [
        f"{where}:{rule.line}: {rule.label}: {rule.match!r} matches no linear of this model; "
        f"expected a glob or re:regex over names like {linears[1].name!r}"
        for rule in rules
        if not rule.optional and not any(rule.matches(linear.name) for linear in linears)
    ]


def idle_rules(rules: Sequence[Rule], decisions: Mapping[str, Decision]) -> list[str]:
    """Rules that match linears and decide over none of them: not wrong, but hardly what was meant."""
    deciding = {decision.rule for decision in decisions.values()}
    return [
        f"{rule.label}: {rule.match!r} decides over nothing: all that it matches was decided by an earlier rule or by "
        "mtp, or is a router, an embedding or a head, which a rule quantizes only by its name"
        for rule in rules
        if not rule.optional
        and rule.label not in deciding
        and any(rule.matches(name) for name in decisions)
    ]


def storage_faults(
    decisions: Mapping[str, Decision], output: Format, format_name: str
) -> list[str]:
    """Linears that the format cannot hold, one sentence per reason with a count, and schemes it cannot mix."""
    reasons: dict[str, list[str]] = {}
    schemes: dict[Scheme, Decision] = {}
    for decision in decisions.values():
        if decision.scheme is None:
            continue
        schemes.setdefault(decision.scheme, decision)
        reason = (
            outside_fault(decision)
            or group_size_fault(decision)
            or output.accepts(decision.scheme, decision.linear)
        )
        if reason:
            reasons.setdefault(f"{decision.rule}: {reason}", []).append(decision.linear.name)
    faults = counted(reasons)
    if output.one_scheme and len(schemes) > 1:
        told = ", ".join(f"{d.linear.name} ({difference(s, schemes)})" for s, d in schemes.items())
        others = (
            ", or format compressed_tensors or gptq"
            if all(scheme.kind == "int" for scheme in schemes)
            else ""
        )
        faults.append(
            f"format {format_name} holds one scheme per artifact, found {len(schemes)}: {told}; use one for all "
            f"rules{others}"
        )
    return faults


def difference(scheme: Scheme, among: Iterable[Scheme]) -> str:
    """What tells a scheme from others, in the recipe's words: "bits: 4, double_quant: false"."""
    schemes = list(among)
    names = [
        field.name
        for field in fields(Scheme)
        if len({getattr(each, field.name) for each in schemes}) > 1
    ]
    return ", ".join(f"{name}: {str(getattr(scheme, name)).lower()}" for name in names)


def fp8_faults(
    layout: Layout, decisions: Mapping[str, Decision], output: Format, side: int
) -> list[str]:
    """Linears that cannot stay in FP8 blocks of `side` rows and columns: one sentence per reason, with a count."""
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
                    f"vLLM and SGLang merge this linear with others when loading, which its {rows[name]} rows in FP8 "
                    f"blocks of {side} forbid; use keep: bf16 for them"
                )
                reasons.setdefault(f"{decisions[name].rule}: {reason}", []).append(name)
    return counted(reasons)


def counted(reasons: Mapping[str, Sequence[str]]) -> list[str]:
    """One sentence per reason, with the first module that it is about and how many more there are."""
    return [
        f"{reason} ({names[0]}" + (f" and {len(names) - 1} more)" if len(names) > 1 else ")")
        for reason, names in reasons.items()
    ]


def outside_fault(decision: Decision) -> str | None:
    """An embedding or a head: the build stores what lies outside the blocks as it is."""
    if decision.block is not None:
        return None
    return f"the build quantizes inside blocks only, found the {decision.linear.role}; keep it"


def group_size_fault(decision: Decision) -> str | None:
    """A group size that does not divide the row, with the sizes that would."""
    scheme, width = decision.scheme, decision.linear.in_features
    if scheme is None or scheme.group_size == -1 or width % scheme.group_size == 0:
        return None
    fitting = [size for size in (128, 64, 32) if width % size == 0 and scheme.kind == "int"]
    use = f"use {' or '.join(map(str, fitting))}" if fitting else "keep this linear"
    return f"group_size {scheme.group_size} does not divide {width} input features; {use}"


def fused_faults(
    layout: Layout, decisions: Mapping[str, Decision], output: Format, refusing: Collection[str]
) -> list[str]:
    """Linears that engines merge at load but that were decided differently; `refusing` do not load the artifact.

    A build solves the routed experts of a block by one scheme, whoever loads them.
    """
    merging = (
        []
        if output.ordinary
        else [name for name in SERVERS if name in output.engines and name not in refusing]
    )
    faults = []
    for block in layout.blocks:
        routed = block.experts.linear(0, block.experts.gate) if block.experts else None
        for members in block.fused:
            if not merging and routed not in members:
                continue
            outcomes: dict[tuple[str, Scheme | None], str] = {}
            for name in members:
                kept = " in FP8" if decisions[name].keep == "fp8" else ""
                outcomes.setdefault((decisions[name].action + kept, decisions[name].scheme), name)
            if len(outcomes) > 1:
                told = ", ".join(
                    f"{name} ({decisions[name].rule}: {action})"
                    for (action, _), name in outcomes.items()
                )
                loads = f"{' and '.join(merging)} merge{'s' if len(merging) == 1 else ''} these linears when loading"
                why = (
                    loads
                    if merging
                    else "quantkit solves and loads the routed experts of a block together"
                )
                faults.append(
                    f"{block.name}: {why}, so they need one decision, found {len(outcomes)}: {told}"
                )
    return faults
