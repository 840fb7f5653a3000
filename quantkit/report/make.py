"""From what a build measured to the report's values; nothing is computed anew, nothing is rounded."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Literal

from quantkit.artifact import fidelity_schema
from quantkit.artifact.fidelity_schema import Benchmark, Fidelity, Figure
from quantkit.artifact.manifest import versions
from quantkit.artifact.records import BlockRecord, ModuleRecord
from quantkit.build.quantize_linear import FALLBACKS
from quantkit.checkpoint.fp8_pairs import FP8
from quantkit.contracts import PROTECTED_ROLES
from quantkit.contracts import Role as LinearRole
from quantkit.evaluate.distribution import Measured
from quantkit.formats.common.engine_names import UNFUSED, apart
from quantkit.numerics.fidelity import Estimate
from quantkit.plan.decisions import NO_RULE, Decision
from quantkit.plan.plan import Plan, find_unsupported_engines
from quantkit.plan.summary import (
    compute_bytes_after,
    format_kept_dtype,
    format_scheme,
    format_source_dtype,
    summarize_rules,
)
from quantkit.texts.corpora import CorpusSet, Tokens

TextName = Literal["calibration", "fidelity"]


UNFUSED_NOTE = (
    f"SGLang needs {UNFUSED}, because the shared experts are not stored like the routed ones."
)
PROTECTED_REASON = "only a rule that names it quantizes it"


def fidelity(
    plan: Plan,
    blocks: Sequence[BlockRecord],
    measured: Measured | None,
    texts: Mapping[TextName, fidelity_schema.Text],
    likelihood: Sequence[fidelity_schema.Likelihood],
    benchmarks: Sequence[Benchmark],
    licence: fidelity_schema.License | None,
) -> Fidelity:
    """The whole report, not judged yet."""
    records = [record for block in blocks for record in block.modules]
    return Fidelity(
        artifact=artifact(plan),
        source=source(plan, licence),
        calibration=texts.get("calibration"),
        measured_on=texts.get("fidelity"),
        distribution=distribution(measured) if measured else (),
        likelihood=tuple(likelihood),
        blocks=tuple(
            fidelity_schema.BlockError(block=block.name, relative_error=block.output_error)
            for block in blocks
            if block.output_error is not None
        ),
        modules=tuple(module(record) for record in records),
        routers=tuple(
            fidelity_schema.Router(block=block.name, agreement=block.router_agreement)
            for block in blocks
            if block.router_agreement is not None
        ),
        experts=experts(plan, blocks),
        fallbacks=fallbacks(records),
        benchmarks=tuple(benchmarks),
        versions=versions(plan),
        seeds={"calibration": plan.recipe.calibration.seed} if plan.recipe.calibration else {},
        hashes={"recipe": plan.recipe.hash, "plan": plan.hash},
        command=command(plan),
    )


def command(plan: Plan) -> str:
    """What makes the artifact again."""
    changes = [f"--set {shlex.quote(f'{key}={text}')}" for key, text in plan.recipe.overrides]
    return " ".join(["quantkit build", PurePath(plan.recipe.name).name, *changes])


def artifact(plan: Plan) -> fidelity_schema.Artifact:
    """What was made, in numbers and in words."""
    quantized = [decision for decision in plan.decisions.values() if decision.action == "quantize"]
    weights = sum(decision.linear.n_parameters for decision in quantized)
    stored = sum(compute_bytes_after(plan, decision) for decision in quantized)
    refusing = find_unsupported_engines(
        plan.format, plan.source.config, plan.layout, plan.decisions
    )
    unfused = apart(spec.name for shard in plan.shards for spec in shard.tensors)
    return fidelity_schema.Artifact(
        name=PurePath(plan.path).name,
        format=plan.format_name,
        scheme="; ".join(schemes(quantized)) or "nothing is quantized",
        parameters=plan.parameters,
        bytes_source=plan.source_bytes(),
        bytes_artifact=plan.n_bytes,
        bits_per_weight=8 * stored / weights if weights else 16.0,
        rules=tuple(summarize_rules(plan)),
        roles=tuple(roles(plan)),
        serving=tuple(serving(plan, refusing, unfused)),
        notes=(
            *plan.architecture.serving_notes,
            *((UNFUSED_NOTE,) if unfused else ()),
            *(f"Not for {engine}: {why}." for engine, why in refusing.items()),
            *fp8_notes(plan),
        ),
        tags=(plan.format_name.replace("_", "-"), f"{plan.recipe.quantize.bits}-bit"),
    )


def serving(
    plan: Plan, refusing: Mapping[str, str], unfused: bool
) -> Iterator[fidelity_schema.Serving]:
    """The command of every engine that reads all that is quantized."""
    name = PurePath(plan.path).name
    for engine, command in plan.format.engines.items():
        flag = f" {UNFUSED}" if unfused and engine == "SGLang" else ""
        if engine not in refusing:
            yield fidelity_schema.Serving(engine=engine, command=command.format(path=name) + flag)


def fp8_notes(plan: Plan) -> tuple[str, ...]:
    """What an operator must know of FP8 blocks that were kept."""
    if not any(decision.keep == "fp8" for decision in plan.decisions.values()):
        return ()
    return (
        "Layers kept in FP8 are run as engines run the FP8 source, with inputs rounded to FP8 on the way (natively on "
        "GPUs from Ada and Hopper on); the figures here are of the weights alone.",
    )


def schemes(quantized: Sequence[Decision]) -> list[str]:
    """ "awq, int4 g128 asymmetric, bfloat16 scales", one per scheme in use."""
    told = [
        f"{d.method}{'' if d.rounding in ('nearest', d.method) else f' + {d.rounding} rounding'}, "
        f"{format_scheme(d.scheme)}, {'8-bit' if d.scheme.double_quant else d.scheme.scale_dtype} scales"
        for d in quantized
        if d.scheme is not None
    ]
    return list(dict.fromkeys(told))


def roles(plan: Plan) -> list[fidelity_schema.Role]:
    """What happened to the linears of each role, and why."""
    patterns = {rule.label: rule.match for rule in plan.rules}
    by_role: dict[LinearRole, list[Decision]] = {}
    for decision in plan.decisions.values():
        by_role.setdefault(decision.linear.role, []).append(decision)
    found = []
    for role, decisions in by_role.items():
        kept = [decision for decision in decisions if decision.action != "quantize"]
        stored = dict.fromkeys(
            format_scheme(d.scheme)
            if d.scheme
            else ("dropped" if d.action == "drop" else format_kept_dtype(plan, d))
            for d in decisions
        )
        reasons = dict.fromkeys(why(d, patterns) for d in decisions)
        found.append(
            fidelity_schema.Role(
                role=role,
                quantized=len(decisions) - len(kept),
                kept=len(kept),
                parameters=sum(decision.linear.n_parameters for decision in decisions),
                stored=", ".join(stored),
                reason=", ".join(reasons) + unpacked(plan, kept),
            )
        )
    return found


def why(decision: Decision, patterns: Mapping[str, str]) -> str:
    """The rule that decided, with its pattern."""
    if decision.rule == NO_RULE:
        return PROTECTED_REASON if decision.linear.role in PROTECTED_ROLES else "no rule matches it"
    if decision.rule not in patterns:
        return decision.rule
    kept = "kept by " if decision.action == "keep" else ""
    return f"{kept}{decision.rule} ({patterns[decision.rule]})"


def unpacked(plan: Plan, kept: Sequence[Decision]) -> str:
    """Why FP8 blocks that rules keep as they are became BF16; "" where none did."""
    fp8 = (
        plan.specs[f"{d.linear.name}.weight"].dtype == FP8
        for d in kept
        if (d.action, d.keep) == ("keep", "source")
    )
    if not any(fp8):
        return ""
    holds = plan.format.fp8_scale is not None
    return f"; BF16 because {'nothing is quantized' if holds else f'format {plan.format_name} cannot hold FP8'}"


def source(plan: Plan, licence: fidelity_schema.License | None) -> fidelity_schema.Source:
    """What the artifact is compared with."""
    dtype = format_source_dtype(plan)
    return fidelity_schema.Source(
        model=plan.source.model,
        revision=plan.source.revision,
        hash=plan.source.fingerprint or "",
        architecture=plan.source.config.text("model_type"),
        dtype=dtype,
        baseline=f"BF16 dequantization of {dtype}" if dtype.startswith("FP8") else dtype,
        license=licence,
    )


def licence(card: Mapping[str, str]) -> fidelity_schema.License | None:
    """The source's licence as its own model card states it; None when it states none."""
    if "license" not in card:
        return None
    return fidelity_schema.License(
        id=card["license"], name=card.get("license_name"), link=card.get("license_link")
    )


def text(corpus: CorpusSet, tokens: Tokens, length: int, seed: int | None) -> fidelity_schema.Text:
    """Text that was calibrated or measured on."""
    return fidelity_schema.Text(
        set=corpus.name,
        license=corpus.licence,
        sha256=corpus.sha256,
        sequences=tokens.n_sequences,
        length=length,
        tokens=tokens.n_tokens,
        seed=seed,
        description=corpus.origin,
    )


def figure(estimate: Estimate) -> Figure:
    """A measured number with its standard error."""
    return Figure(value=estimate.value, se=estimate.error)


def distribution(measured: Measured) -> tuple[fidelity_schema.Distribution, ...]:
    """The figures of every domain, all text first."""
    found = []
    for domain, figures in measured.summaries().items():
        values = {name: figure(estimate) for name, estimate in figures.items()}
        found.append(
            fidelity_schema.Distribution(domain=domain, tokens=figures["kl_mean"].n, **values)
        )
    return tuple(found)


def module(record: ModuleRecord) -> fidelity_schema.Module:
    """What became of one quantized matrix."""
    return fidelity_schema.Module(
        name=record.module,
        rule=record.rule,
        method=record.method,
        rounding=record.rounding,
        scheme=format_scheme(record.scheme),
        relative_error=record.relative_error,
        sqnr_db=record.sqnr_db,
        output_relative_error=record.output_error,
        tokens=record.tokens,
        fallback=", ".join(record.fallbacks) or None,
        rescaled=record.rescaled,
    )


def experts(plan: Plan, blocks: Sequence[BlockRecord]) -> fidelity_schema.Experts | None:
    """Calibration tokens per expert."""
    layers = tuple(
        fidelity_schema.ExpertLayer(block=b.name, tokens=b.expert_tokens)
        for b in blocks
        if b.expert_tokens
    )
    calibration = plan.recipe.calibration
    if not layers or calibration is None:
        return None
    return fidelity_schema.Experts(
        min_tokens=calibration.min_expert_tokens, policy=calibration.under_calibrated, layers=layers
    )


def fallbacks(records: Sequence[ModuleRecord]) -> tuple[fidelity_schema.Fallback, ...]:
    """Every fallback that was taken, with the modules that took it."""
    taken: dict[str, list[str]] = {}
    for record in records:
        for name in record.fallbacks:
            taken.setdefault(name, []).append(record.module)
    return tuple(
        fidelity_schema.Fallback(kind=k, meaning=FALLBACKS[k], modules=tuple(m))
        for k, m in taken.items()
    )
