"""The report of a build: plan, records and measurements as the values of fidelity.json.

Nothing is recomputed and nothing is rounded here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Literal

from quantkit.artifact import fidelity_schema
from quantkit.artifact.account_tensors import (
    SourceAccount,
    account_tensors,
    list_block_tensors,
    list_held_names,
)
from quantkit.artifact.engine_reasons import NOT_FOR
from quantkit.artifact.fidelity_schema import BenchmarkResult, Fidelity
from quantkit.artifact.front_matter import has_chat_template, read_front_matter, read_languages
from quantkit.artifact.make_manifest import read_versions
from quantkit.artifact.records import BlockRecord, ModuleRecord, list_kept_codes
from quantkit.build.quantize_linear import FALLBACKS
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.encoding import FP8
from quantkit.contracts import PROTECTED_ROLES
from quantkit.contracts import Role as LinearRole
from quantkit.errors import ArtifactError
from quantkit.evaluate.token_fidelity import TextFidelity
from quantkit.evaluate.token_samples import TokenSamples, list_worst_tokens
from quantkit.formats.common.engine_names import DISABLE_SHARED_FUSION, has_separate_shared_experts
from quantkit.plan.decisions import NO_RULE, Decision
from quantkit.plan.engine_limits import find_unsupported_engines
from quantkit.plan.plan import Plan
from quantkit.plan.summary import (
    compute_bytes_after,
    format_baseline,
    format_kept_dtype,
    format_scheme,
    format_source_dtype,
    summarize_copied,
    summarize_rules,
)
from quantkit.report.format_numbers import TEXT_ONLY, describe_copy, format_parts
from quantkit.report.reproduce import BuildCommand
from quantkit.report.summarize_yardstick import make_figure, summarize_noise, summarize_yardstick
from quantkit.texts.corpora import CorpusSet
from quantkit.texts.tokens import Tokens

TextName = Literal["calibration", "fidelity"]


SGLANG = "SGLang"
PIPELINE_TAGS = {"logits": "text-generation", "labels": "text-classification"}
"""Output of a layout -> the hub's task; embeddings otherwise."""
UNFUSED_NOTE = (
    f"SGLang needs {DISABLE_SHARED_FUSION}, because shared and routed experts are stored in "
    "different formats."
)
NO_CHAT_TEMPLATE = "the model has no chat template: messages are joined by blank lines"
PROTECTED_REASON = "only a rule that names it quantizes it"


@dataclass(frozen=True, kw_only=True)
class StatedFacts:
    """Facts that the source states: None or empty where its card says nothing."""

    license: fidelity_schema.License | None = None
    languages: tuple[str, ...] = ()  # "en"
    chat: bool = False  # it has a chat template


def make_report(
    plan: Plan,
    blocks: Sequence[BlockRecord],
    samples: TokenSamples | None,
    texts: Mapping[TextName, fidelity_schema.TextSet],
    likelihood: Sequence[fidelity_schema.LikelihoodResult],
    benchmarks: Sequence[BenchmarkResult],
    stated: StatedFacts,
    command: BuildCommand,
) -> Fidelity:
    """Return the report before its gates are judged.

    stated: by the source's card; command: builds the artifact again.
    """
    records = [record for block in blocks for record in block.modules]
    records += list_kept_codes(plan)
    measured = samples.measured if samples else None
    return Fidelity(
        artifact=summarize_artifact(plan),
        source=summarize_source(plan, stated),
        calibration=texts.get("calibration"),
        measured_on=add_repeated(texts.get("fidelity"), measured),
        distribution=summarize_distribution(measured) if measured else (),
        yardstick=summarize_yardstick(measured) if measured else None,
        noise_floor=summarize_noise(measured) if measured else None,
        worst_tokens=list_worst_tokens(samples) if samples else (),
        keeps_text=samples is None or samples.keeps_text,
        likelihood=tuple(likelihood),
        blocks=tuple(
            fidelity_schema.BlockError(block=block.name, relative_error=block.output_error)
            for block in blocks
            if block.output_error is not None
        ),
        modules=tuple(summarize_module(record) for record in records),
        routers=tuple(
            fidelity_schema.RouterAgreement(block=block.name, agreement=block.router_agreement)
            for block in blocks
            if block.router_agreement is not None
        ),
        experts=summarize_experts(plan, blocks),
        coverage=summarize_coverage(blocks),
        fallbacks=summarize_fallbacks(records),
        benchmarks=tuple(benchmarks),
        versions=read_versions(plan),
        seeds={"calibration": plan.recipe.calibration.seed} if plan.recipe.calibration else {},
        hashes={"recipe": plan.recipe.hash, "plan": plan.hash},
        command=command.text,
        needs=command.needs,
    )


def summarize_artifact(plan: Plan) -> fidelity_schema.ArtifactSummary:
    """Summarize the artifact: sizes, scheme, roles, serve commands, notes and tags."""
    quantized = [decision for decision in plan.decisions.values() if decision.action == "quantize"]
    weights = sum(decision.linear.n_parameters for decision in quantized)
    stored = sum(compute_bytes_after(plan, decision) for decision in quantized)
    unsupported = find_unsupported_engines(
        plan.format, plan.source.config, plan.layout, plan.decisions
    )
    unfused = has_separate_shared_experts(
        spec.name for shard in plan.shards for spec in shard.tensors
    )
    return fidelity_schema.ArtifactSummary(
        name=PurePath(plan.path).name,
        format=plan.format_name,
        scheme="; ".join(format_schemes(quantized)) or "nothing is quantized",
        parameters=plan.parameters,
        bytes_source=plan.source_bytes(),
        bytes_artifact=plan.n_bytes,
        bits_per_weight=8 * stored / weights if weights else 16.0,
        rules=tuple(summarize_rules(plan)),
        roles=tuple(summarize_roles(plan)),
        serving=tuple(iterate_serving_commands(plan, unsupported, unfused)),
        notes=(
            *plan.architecture.serving_notes,
            *make_parts_notes(plan),
            *((UNFUSED_NOTE,) if unfused and loads_with(plan, unsupported, SGLANG) else ()),
            *(f"{NOT_FOR}{engine}: {reason}." for engine, reason in unsupported.items()),
            *make_fp8_notes(plan),
            *(f"Source: {note}." for note in plan.source.notes),
        ),
        tags=make_tags(plan, quantized),
    )


def make_tags(plan: Plan, quantized: Sequence[Decision]) -> tuple[str, ...]:
    """Return the hub's tags: format, and the widths of the quantized weights."""
    widths = sorted({decision.scheme.bits for decision in quantized if decision.scheme})
    return (plan.format_name.replace("_", "-"), *(f"{bits}-bit" for bits in widths))


def loads_with(plan: Plan, unsupported: Mapping[str, str], engine: str) -> bool:
    """Return whether an engine loads the artifact."""
    return engine in plan.format.engines and engine not in unsupported


def make_parts_notes(plan: Plan) -> tuple[str, ...]:
    """Return the note on the parts of a wrapper that text does not run through."""
    parts = summarize_copied(plan)
    if not parts:
        return ()
    return (f"{describe_copy(parts).capitalize()}: {format_parts(parts)}; {TEXT_ONLY}.",)


def iterate_serving_commands(
    plan: Plan, unsupported: Mapping[str, str], unfused: bool
) -> Iterator[fidelity_schema.ServeCommand]:
    """Yield the command of every engine that supports all quantized layers."""
    name = PurePath(plan.path).name
    for engine, command in plan.format.engines.items():
        flag = f" {DISABLE_SHARED_FUSION}" if unfused and engine == SGLANG else ""
        if engine not in unsupported:
            yield fidelity_schema.ServeCommand(
                engine=engine, command=command.format(path=name) + flag
            )


def make_fp8_notes(plan: Plan) -> tuple[str, ...]:
    """Return notes on layers kept in FP8."""
    if not any(decision.keep == "fp8" for decision in plan.decisions.values()):
        return ()
    return (
        "Engines run layers kept in FP8 like the FP8 source, with inputs rounded to FP8 "
        "(natively on Ada, Hopper and newer GPUs); the figures here cover the weights only.",
    )


def format_schemes(quantized: Sequence[Decision]) -> list[str]:
    """Return "awq, int4 g128 asymmetric, bfloat16 scales" for every scheme in use."""
    texts = [
        f"{d.method}{'' if d.rounding in ('nearest', d.method) else f' + {d.rounding} rounding'}, "
        f"{format_scheme(d.scheme)}, "
        f"{'8-bit' if d.scheme.double_quant else d.scheme.scale_dtype} scales"
        for d in quantized
        if d.scheme is not None
    ]
    return list(dict.fromkeys(texts))


def summarize_roles(plan: Plan) -> list[fidelity_schema.RoleSummary]:
    """Return the treatment of each role's linear layers, with the reason."""
    patterns = {rule.label: rule.match for rule in plan.rules}
    by_role: dict[LinearRole, list[Decision]] = {}
    for decision in plan.decisions.values():
        by_role.setdefault(decision.linear.role, []).append(decision)
    summaries = []
    for role, decisions in by_role.items():
        kept = [decision for decision in decisions if decision.action != "quantize"]
        stored = dict.fromkeys(
            format_scheme(d.scheme)
            if d.scheme
            else ("dropped" if d.action == "drop" else format_kept_dtype(plan, d))
            for d in decisions
        )
        reasons = dict.fromkeys(explain_decision(d, patterns) for d in decisions)
        summaries.append(
            fidelity_schema.RoleSummary(
                role=role,
                quantized=len(decisions) - len(kept),
                kept=len(kept),
                parameters=sum(decision.linear.n_parameters for decision in decisions),
                stored=", ".join(stored),
                reason=", ".join(reasons) + explain_unpacked_fp8(plan, kept),
            )
        )
    return summaries


def explain_decision(decision: Decision, patterns: Mapping[str, str]) -> str:
    """Return the rule that decided, with its pattern."""
    if decision.rule == NO_RULE:
        return PROTECTED_REASON if decision.linear.role in PROTECTED_ROLES else "no rule matches it"
    if decision.rule not in patterns:
        return decision.rule
    kept = "kept by " if decision.action == "keep" else ""
    return f"{kept}{decision.rule} ({patterns[decision.rule]})"


def explain_unpacked_fp8(plan: Plan, kept: Sequence[Decision]) -> str:
    """Return the reason that kept FP8 layers became BF16; "" if none did."""
    fp8 = (
        plan.specs[f"{d.linear.name}.weight"].dtype == FP8
        for d in kept
        if (d.action, d.keep) == ("keep", "source")
    )
    if not any(fp8):
        return ""
    holds = plan.format.fp8_scale is not None
    return (
        "; BF16 because "
        f"{'nothing is quantized' if holds else f'format {plan.format_name} cannot hold FP8'}"
    )


def summarize_source(plan: Plan, stated: StatedFacts) -> fidelity_schema.SourceModel:
    """Summarize the source model and the baseline of the figures."""
    return fidelity_schema.SourceModel(
        model=plan.source.model,
        revision=plan.source.revision,
        hash=plan.source.fingerprint or "",
        architecture=plan.source.config.text("model_type"),
        dtype=format_source_dtype(plan),
        baseline=format_baseline(plan),
        license=stated.license,
        languages=stated.languages,
        chat=stated.chat,
        pipeline_tag=PIPELINE_TAGS.get(plan.layout.output, "feature-extraction"),
    )


def account_source(plan: Plan, source: Checkpoint, folder: Path) -> SourceAccount:
    """Account for the tensors of a source with the files of an artifact's folder.

    source: with the experts of stacked tensors split. Raises ArtifactError if a tensor is missing.
    """
    blocks = plan.layout.blocks
    account = account_tensors(
        source,
        {item.name: item.reason for item in plan.left_out},
        {
            name
            for block in blocks
            if any(plan.decisions[linear.name].action == "drop" for linear in block.linears)
            for name in list_block_tensors(block)
        },
        plan.schemes.keys(),
        list_held_names(Checkpoint.open(folder).split_experts(blocks)),
    )
    if fault := account.describe_missing():
        raise ArtifactError(f"{folder}: {fault}; start over with --restart")
    return account


def read_stated_facts(folder: Path) -> StatedFacts:
    """Return license and languages of the source's card, and whether it has a chat template."""
    stated, license = read_front_matter(folder), None
    if "license" in stated:
        license = fidelity_schema.License(
            id=stated["license"], name=stated.get("license_name"), link=stated.get("license_link")
        )
    return StatedFacts(
        license=license, languages=read_languages(folder), chat=has_chat_template(folder)
    )


def summarize_text(
    corpus: CorpusSet,
    tokens: Tokens,
    length: int,
    seed: int | None,
    *,
    has_template: bool = True,
    chosen: str = "",
    labels: Sequence[str] | None = None,
) -> fidelity_schema.TextSet:
    """Summarize a calibration or fidelity text.

    has_template: the model has a chat template; chosen: why `auto` stands for the set; labels: the
    kind of each sequence before small ones were pooled.
    """
    return fidelity_schema.TextSet(
        set=corpus.name,
        license=corpus.license,
        sha256=corpus.sha256,
        sequences=tokens.n_sequences,
        length=length,
        tokens=tokens.n_tokens,
        seed=seed,
        description=corpus.origin,
        kinds=count_tokens(tokens, tokens.domains),
        pooled=list_pools(labels or tokens.domains, tokens.domains),
        parts=summarize_parts(corpus, tokens, has_template),
        chosen=chosen,
    )


def list_pools(labels: Sequence[str], pooled: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the members of each label that pools others; both have one label per sequence."""
    members: dict[str, set[str]] = {}
    for label, pool in zip(labels, pooled, strict=True):
        members.setdefault(pool, set()).add(label)
    return {
        pool: tuple(sorted(names)) for pool, names in sorted(members.items()) if names != {pool}
    }


def count_tokens(tokens: Tokens, labels: Sequence[str]) -> dict[str, int]:
    """Return the tokens per label; `labels` has one per sequence."""
    counts = Counter[str]()
    for label, length in zip(labels, tokens.lengths, strict=True):
        counts[label] += length
    return dict(sorted(counts.items()))


def summarize_parts(
    corpus: CorpusSet, tokens: Tokens, has_template: bool
) -> tuple[fidelity_schema.TextPart, ...]:
    """Summarize what each part of a mixture contributed."""
    counts = count_tokens(tokens, tokens.parts) if corpus.parts else {}
    answers = count_answers(tokens)
    return tuple(
        fidelity_schema.TextPart(
            name=part.spec.name,
            kind=part.spec.kind,
            language=part.spec.language,
            license=part.spec.license,
            sha256=part.sha256,
            sequences=tokens.parts.count(part.spec.name),
            tokens=counts[part.spec.name],
            answers=answers.get(part.spec.name),
            skipped=part.skipped + tokens.refused.get(part.spec.name, 0),
            description=part.spec.origin
            if has_template or not part.chats
            else f"{part.spec.origin}; {NO_CHAT_TEMPLATE}",
        )
        for part in corpus.parts
    )


def count_answers(tokens: Tokens) -> dict[str, int]:
    """Return the tokens of assistants' messages per part that has chats."""
    counts = Counter[str]()
    for part, answers in zip(tokens.parts, tokens.answers, strict=True):
        if answers is not None:
            counts[part] += sum(end - start for start, end in answers)
    return dict(counts)


def add_repeated(
    text: fidelity_schema.TextSet | None, measured: TextFidelity | None
) -> fidelity_schema.TextSet | None:
    """Return the fidelity text with the number of its tokens that repeat another document."""
    if text is None or measured is None:
        return text
    return text.model_copy(update={"repeated": measured.repeated})


def summarize_distribution(
    measured: TextFidelity,
) -> tuple[fidelity_schema.DistributionResult, ...]:
    """Return the figures of every domain, those of all text first."""
    rows = []
    for domain, figures in measured.summarize().items():
        values = {name: make_figure(estimate) for name, estimate in figures.items()}
        tokens = figures["kl_mean"].n
        row = {"domain": domain, "tokens": tokens, **values}
        rows.append(fidelity_schema.DistributionResult.model_validate(row))
    return tuple(rows)


def summarize_module(record: ModuleRecord) -> fidelity_schema.ModuleResult:
    """Summarize one quantized matrix."""
    return fidelity_schema.ModuleResult(
        name=record.module,
        rule=record.rule,
        method=record.method,
        rounding=record.rounding,
        scheme=format_scheme(record.scheme),
        relative_error=record.relative_error,
        sqnr_db=record.sqnr_db,
        output_relative_error=record.output_relative_error,
        tokens=record.tokens,
        fallback=", ".join(record.fallbacks) or None,
        rescaled=record.rescaled,
    )


def summarize_experts(
    plan: Plan, blocks: Sequence[BlockRecord]
) -> fidelity_schema.ExpertCoverage | None:
    """Summarize the calibration tokens per expert; None without routed experts."""
    layers = tuple(
        fidelity_schema.ExpertTokens(block=b.name, tokens=b.expert_tokens)
        for b in blocks
        if b.expert_tokens
    )
    calibration = plan.recipe.calibration
    if not layers or calibration is None:
        return None
    return fidelity_schema.ExpertCoverage(
        min_tokens=calibration.min_expert_tokens, policy=calibration.under_calibrated, layers=layers
    )


def summarize_coverage(
    blocks: Sequence[BlockRecord],
) -> tuple[fidelity_schema.BlockCoverage, ...] | None:
    """Summarize how far calibration spans the fidelity text; None where it was not measured."""
    measured = tuple(
        fidelity_schema.BlockCoverage(
            block=block.name,
            inputs=tuple(fidelity_schema.InputCoverage(**asdict(x)) for x in block.coverage),
        )
        for block in blocks
        if block.coverage
    )
    return measured or None


def summarize_fallbacks(records: Sequence[ModuleRecord]) -> tuple[fidelity_schema.FallbackUse, ...]:
    """Return every fallback in use, with its modules."""
    uses: dict[str, list[str]] = {}
    for record in records:
        for name in record.fallbacks:
            uses.setdefault(name, []).append(record.module)
    return tuple(
        fidelity_schema.FallbackUse(kind=k, meaning=FALLBACKS[k], modules=tuple(m))
        for k, m in uses.items()
    )
