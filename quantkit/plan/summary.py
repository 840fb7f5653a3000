"""The summary of a plan, for the terminal and `--json`."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.checkpoint.logical_tensors import describe_encodings
from quantkit.contracts import Scheme
from quantkit.plan.decisions import Decision
from quantkit.plan.measurements import (
    explain_scratch,
    list_gates,
    summarize_engines,
    summarize_streams,
    summarize_tasks,
)
from quantkit.plan.plan import Plan
from quantkit.plan.plan_schema import (
    PlanMemory,
    PlanPart,
    PlanRule,
    PlanShard,
    PlanSource,
    PlanSummary,
    PlanTime,
    PlanTotals,
)
from quantkit.plan.size_gain import describe_small_gain


def summarize_plan(
    plan: Plan, sampled: Sequence[str] = (), time: PlanTime | None = None
) -> PlanSummary:
    """Return the summary that `quantkit plan` prints.

    sampled: sentences on texts that the model samples itself. time: see `time_estimate`.
    """
    memory = plan.memory
    parts = {"base": memory.base_bytes}
    block = memory.dense_bytes + memory.batch_bytes + memory.wave_experts * memory.expert_bytes
    if memory.head_bytes > block:
        parts["final norm and head"] = memory.head_bytes
    else:
        batch = "one batch with eager attention" if plan.layout.eager_heads else "one batch"
        parts |= {"block without experts": memory.dense_bytes, batch: memory.batch_bytes}
        parts |= {
            f"wave of {memory.wave_experts} experts": block
            - memory.dense_bytes
            - memory.batch_bytes
        }
    return PlanSummary(
        recipe=plan.recipe.name,
        output=plan.path,
        source=summarize_source(plan),
        rules=tuple(summarize_rules(plan)),
        totals=summarize_totals(plan),
        memory=PlanMemory(
            budget=memory.budget_bytes,
            peak=memory.peak_bytes,
            parts={name: value for name, value in parts.items() if value},
            scratch_disk=memory.scratch_bytes,
            scratch_reason=explain_scratch(plan),
            experts_per_wave=memory.wave_experts or None,
        ),
        shards=tuple(
            PlanShard(file=s.file, tensors=len(s.tensors), bytes=s.n_bytes) for s in plan.shards
        ),
        copied=summarize_copied(plan),
        texts=plan.texts,
        streams=summarize_streams(plan),
        tasks=summarize_tasks(plan),
        gates=list_gates(plan.recipe.gates),
        engines=summarize_engines(plan),
        time=time,
        sampled=tuple(sampled),
        costs=describe_costs(plan),
        warnings=(*plan.warnings, *find_size_warnings(plan)),
    )


def describe_costs(plan: Plan) -> tuple[str, ...]:
    """Return the cost of the yardstick as a sentence; nothing without one."""
    text = plan.recipe.fidelity
    if text is None or text.yardstick is None:
        return ()
    tokens = plan.tokens.get("fidelity", 0)
    calibrated = plan.tokens.get("calibration", 0) if plan.needs_calibration else 0
    before = calibrated * (2 if plan.propagation == "both" else 1) + 2 * tokens
    factor = f", {1 + tokens / before:.2f} times the forward passes" if before else ""
    cost = (
        f"yardstick {text.yardstick}: the fidelity text, at most {tokens:,} tokens, runs through "
        f"every block once more, with weights rounded to nearest{factor}"
    )
    used = {d.method for d in plan.decisions.values() if d.action == "quantize"}
    if used <= {text.yardstick}:
        cost += "; every module of this recipe is rounded to nearest, so it measures the same twice"
    return (cost,)


def summarize_source(plan: Plan) -> PlanSource:
    """Return the summary of the source."""
    return PlanSource(
        model=plan.source.model,
        revision=plan.source.revision,
        architecture=plan.source.config.text("model_type"),
        dtype=format_source_dtype(plan),
        compared_with=format_baseline(plan),
        parameters=plan.parameters,
        parameters_without_mtp=count_parameters_without_mtp(plan),
        bytes=plan.source_bytes(),
        code=plan.source.code,
        read_from="the published config; sizes are computed, no header was read"
        if plan.is_assumed
        else "headers",
    )


def summarize_copied(plan: Plan) -> tuple[PlanPart, ...]:
    """Return the parts of a wrapper that are copied, with the bytes of their tensors."""
    decoded = {*plan.decoded_parts}
    return tuple(
        PlanPart(
            name=part.name,
            tensors=len(part.tensors),
            bytes=plan.source_bytes(part.tensors),
            decoded=len(decoded & {*part.tensors}),
        )
        for part in plan.layout.parts
    )


def count_parameters_without_mtp(plan: Plan) -> int | None:
    """Return the parameters outside the MTP layers ("671 B" of a name); None without MTP layers."""
    inside = tuple(f"{block.name}." for block in plan.layout.blocks if block.kind == "mtp")
    if not inside:
        return None
    return sum(spec.n_elements for name, spec in plan.specs.items() if not name.startswith(inside))


def format_source_dtype(plan: Plan) -> str:
    """Return the dtype of the source's matrices: "FP8 128x128", "INT4 g32 symmetric", "BF16"."""
    if plan.source.encoded:
        return ", ".join(label for label, _ in describe_encodings(plan.source.encoded))
    if plan.is_assumed and plan.source.fp8_side:
        return f"FP8 {plan.source.fp8_side}x{plan.source.fp8_side}"
    return plan.specs[f"{plan.layout.embedding.name}.weight"].dtype


def format_baseline(plan: Plan) -> str:
    """Return the baseline of the figures: "BF16", "BF16 dequantization of FP8 128x128"."""
    stored = format_source_dtype(plan)
    if not plan.source.encoded and not stored.startswith("FP8"):
        return stored
    decoded = dict.fromkeys(
        "BF16" if weight.block else weight.spec.dtype for weight in plan.source.encoded.values()
    )
    return f"{', '.join(decoded) or 'BF16'} dequantization of {stored}"


def format_scheme(scheme: Scheme) -> str:
    """Format a scheme: "int4 g128 asymmetric", "nf4 g64 double quant"."""
    if scheme.kind == "nf4":
        return f"nf4 g{scheme.group_size}{' double quant' if scheme.double_quant else ''}"
    group = "per row" if scheme.group_size == -1 else f"g{scheme.group_size}"
    if scheme.kind != "int":
        return f"{scheme.kind.upper()} {group}"
    return f"int{scheme.bits} {group} {'symmetric' if scheme.symmetric else 'asymmetric'}"


def format_action(decision: Decision) -> str:
    """Format a decision: "awq int4 g128 asymmetric", "keep", "keep FP8", "drop", "keep, decoded
    from NF4 g64".
    """
    if decision.encoding is not None:
        return f"{decision.action} {decision.encoding}"
    if decision.scheme is None:
        stored = format_scheme(decision.codes) if decision.codes else "FP8"
        has_codes = decision.keep in ("fp8", "codes")
        decoded = f", decoded from {decision.decoded_from}" if decision.decoded_from else ""
        return f"{decision.action} {stored}" if has_codes else f"{decision.action}{decoded}"
    rounding = (
        f"+{decision.rounding}"
        if decision.rounding not in {None, "nearest", decision.method}
        else ""
    )
    method = "" if decision.method == decision.scheme.kind else f"{decision.method}{rounding} "
    return method + format_scheme(decision.scheme)


def compute_bytes_after(plan: Plan, decision: Decision) -> int:
    """Return the bytes of a linear's weight in the artifact, with scales and zero points."""
    if decision.action == "drop":
        return 0
    if decision.scheme is not None:
        return sum(spec.n_bytes for spec in plan.format.layout(decision.linear, decision.scheme))
    if decision.encoding is not None:
        return plan.source_bytes([f"{decision.linear.name}.weight"])
    return sum(spec.n_bytes for spec in plan.kept.list_weight_tensors(decision))


def format_kept_dtype(plan: Plan, decision: Decision) -> str:
    """Return the dtype of a kept weight in the artifact: "BF16", "F8_E4M3 128x128"."""
    if decision.codes is not None:
        return f"{format_scheme(decision.codes)} of the source"
    if decision.encoding is not None:
        return f"{decision.encoding} of the source"
    dtype = plan.kept.list_weight_tensors(decision)[0].dtype
    return f"{dtype} {plan.kept.side}x{plan.kept.side}" if decision.keep == "fp8" else dtype


def summarize_rules(plan: Plan) -> list[PlanRule]:
    """Return one row per rule and outcome in the order of the rules.

    Unmatched linears come last.
    """
    pattern = {rule.label: rule.match for rule in plan.rules}
    outcomes: dict[tuple[str, str], list[Decision]] = {}
    for decision in plan.decisions.values():
        outcomes.setdefault((decision.rule, format_action(decision)), []).append(decision)
    order = list(pattern)
    rows = sorted(
        outcomes.items(),
        key=lambda item: order.index(item[0][0]) if item[0][0] in order else len(order),
    )
    return [
        summarize_rule(plan, label, pattern.get(label, ""), action, decisions)
        for (label, action), decisions in rows
    ]


def summarize_rule(
    plan: Plan, label: str, match: str, action: str, decisions: Sequence[Decision]
) -> PlanRule:
    """Return the row of one rule and outcome."""
    parameters = sum(decision.linear.n_parameters for decision in decisions)
    after = sum(compute_bytes_after(plan, decision) for decision in decisions)
    return PlanRule(
        label=label,
        match=match,
        action=action,
        modules=len(decisions),
        parameters=parameters,
        bytes_before=plan.source_bytes(f"{decision.linear.name}.weight" for decision in decisions),
        bytes_after=after,
        bits_per_weight=8 * after / parameters,
    )


def find_size_warnings(plan: Plan) -> tuple[str, ...]:
    """Return a warning if something is quantized and the artifact is not clearly smaller."""
    is_quantized = any(decision.action == "quantize" for decision in plan.decisions.values())
    note = describe_small_gain(plan.source_bytes(), plan.n_bytes)
    return (note,) if is_quantized and note else ()


def summarize_totals(plan: Plan) -> PlanTotals:
    """Return the totals of the artifact."""
    quantized = sum(decision.action == "quantize" for decision in plan.decisions.values())
    return PlanTotals(
        modules_quantized=quantized,
        modules_kept=sum(decision.action == "keep" for decision in plan.decisions.values()),
        parameters=plan.parameters,
        tensors=sum(len(shard.tensors) for shard in plan.shards),
        bytes_before=plan.source_bytes(),
        bytes_after=plan.n_bytes,
        bits_per_weight=8 * plan.n_bytes / plan.parameters,
    )
