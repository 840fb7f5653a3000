"""A report's figures as tables of text, made once for the model card and the terminal alike. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

from quantkit.artifact.fidelity_schema import BenchmarkResult, Fidelity, ModuleResult
from quantkit.artifact.layout import FIDELITY
from quantkit.figures import NOT_FINITE, is_size, list_figures
from quantkit.report import format_numbers

WORST = 10
EXAMPLES = 3
MORE = FIDELITY


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under named columns; a column whose name starts with ">" holds numbers and is set flush right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def make_benchmark_table(fidelity: Fidelity) -> Table:
    """Source against artifact, task by task, paired item by item."""
    return make_comparison_table(fidelity.benchmarks, "Greedy, the same prompts on both")


def make_comparison_table(found: Sequence[BenchmarkResult], how: str) -> Table:
    """Rows of two models on the same items; `how` says how both answered."""
    rows: list[tuple[str, ...]] = []
    for row in found:
        if row.status == "not run":
            rows.append((row.task, *(format_numbers.MISSING,) * 7, f"not run: {row.reason}"))
            continue
        changed = (
            format_numbers.MISSING
            if row.lost is None or row.gained is None
            else f"{row.lost}/{row.gained}"
        )
        rows.append((
            row.task,
            format_numbers.format_count(row.n),
            format_numbers.format_percent(row.source, 1),
            format_numbers.format_percent(row.artifact, 1),
            format_numbers.format_points(row.delta_pp),
            format_numbers.format_recovery(row.recovery),
            changed,
            format_numbers.format_probability(row.mcnemar_p),
            row.verdict,
        ))
    columns = (
        "task",
        ">n",
        ">source",
        ">artifact",
        ">Δ pp [95 % CI]",
        ">recovery [95 % CI]",
        ">lost/gained",
        ">p",
        "verdict",
    )
    note = f"{how}; p is McNemar's exact test on the items that changed."
    note += _rates("Cut at the token limit", [(row.task, row.truncated) for row in found])
    note += _rates("No result found", [(row.task, row.unparsed) for row in found])
    return Table(title="Benchmarks", columns=columns, rows=tuple(rows), note=note if rows else "")


def make_distribution_table(fidelity: Fidelity) -> Table:
    """Figures down, domains across."""
    domains = fidelity.distribution
    rows: list[tuple[str, ...]] = (
        [("tokens", *(format_numbers.format_count(row.tokens) for row in domains))]
        if domains
        else []
    )
    for figure in list_figures():
        readings = [figure.read(fidelity, row.domain) for row in domains]
        if figure.scope == "domain" and any(reading.is_measured for reading in readings):
            cells = (format_numbers.format_reading(figure, reading) for reading in readings)
            rows.append((figure.label, *cells))
    return Table(
        title="Next-token distributions",
        columns=("figure", *(f">{row.domain}" for row in domains)),
        rows=tuple(rows),
        note=f"Against {fidelity.source.baseline}; ± is one standard error." if rows else "",
    )


def make_likelihood_table(fidelity: Fidelity) -> Table:
    """Log-likelihood of gold solutions, task by task, paired item by item."""
    rows = tuple(
        (
            row.task,
            format_numbers.format_count(row.n),
            format_numbers.format_count(row.tokens),
            format_numbers.format_digits(row.source, 4),
            format_numbers.format_digits(row.artifact, 4),
            format_numbers.format_nats(row.difference),
        )
        for row in fidelity.likelihood
    )
    silent = (
        f" {row.task} was not run: {row.reason}."
        for row in fidelity.likelihood
        if row.status == "not run"
    )
    note = (
        "Log-likelihood of a right answer behind its prompt, nats per token; nothing is generated."
    )
    return Table(
        title="Gold solutions (teacher-forced)",
        columns=("task", ">items", ">tokens", ">source", ">artifact", ">difference [95 % CI]"),
        rows=rows,
        note=note + "".join(silent) if rows else "",
    )


def make_gate_table(fidelity: Fidelity) -> Table:
    """Every bound of the recipe, and whether it was kept."""
    words = {True: "kept", False: "MISSED", None: "not judged"}
    rows = tuple(
        (
            row.figure,
            row.bound,
            format_numbers.format_size(round(row.value))
            if is_size(row.figure) and row.value
            else format_numbers.format_digits(row.value),
            f"{words[row.ok]}: {row.reason}" if row.reason else words[row.ok],
        )
        for row in fidelity.gates
    )
    return Table(title="Gates", columns=("figure", ">bound", ">value", "result"), rows=rows)


def make_role_table(fidelity: Fidelity) -> Table:
    """What was quantized, and what was not and why."""
    rows = tuple(
        (
            row.role.replace("_", " "),
            format_numbers.format_count(row.quantized),
            format_numbers.format_count(row.kept),
            format_numbers.format_parameters(row.parameters),
            row.stored,
            row.reason,
        )
        for row in fidelity.artifact.roles
    )
    columns = ("part", ">quantized", ">kept", ">parameters", "stored as", "why")
    return Table(title="What is quantized", columns=columns, rows=rows)


def make_module_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """The quantized matrices with the largest relative output error (weight error where that is not known)."""
    quantized = [row for row in fidelity.modules if row.method is not None]
    worst = sorted(quantized, key=_badness, reverse=True)[:limit]
    rows = tuple(
        (
            row.name,
            f"{row.method}+{row.rounding}"
            if row.rounding not in (None, row.method)
            else str(row.method),
            format_numbers.format_percent(row.relative_error),
            format_numbers.MISSING if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
            format_numbers.format_percent(row.output_relative_error),
            format_numbers.format_count(row.tokens),
            row.fallback or ("rescaled" if row.rescaled else ""),
        )
        for row in worst
    )
    columns = ("module", "method", ">weights", ">SQNR dB", ">outputs", ">tokens", "note")
    note = (
        f"The {len(rows)} worst of {len(quantized):,}; all in {MORE}."
        if len(rows) < len(quantized)
        else ""
    )
    return Table(
        title="Relative error of weights and of outputs, worst modules",
        columns=columns,
        rows=rows,
        note=note,
    )


def make_block_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Relative error of the hidden states after a block, largest first."""
    worst = sorted(fidelity.blocks, key=lambda row: _rank(row.relative_error, inf), reverse=True)[
        :limit
    ]
    rows = tuple((row.block, _finite(row.relative_error)) for row in worst)
    note = (
        f"The {len(rows)} worst of {len(fidelity.blocks)} blocks."
        if len(rows) < len(fidelity.blocks)
        else ""
    )
    return Table(
        title="Relative error of the hidden states after a block",
        columns=("block", ">error"),
        rows=rows,
        note=note,
    )


def make_router_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Share of expert choices that agree, least first."""
    least = sorted(fidelity.routers, key=lambda row: _rank(row.agreement, missing=-1.0))[:limit]
    rows = tuple((row.block, _finite(row.agreement)) for row in least)
    note = (
        f"The {len(rows)} lowest of {len(fidelity.routers)} layers."
        if len(rows) < len(fidelity.routers)
        else ""
    )
    return Table(title="Router agreement", columns=("block", ">same experts"), rows=rows, note=note)


def make_expert_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Calibration tokens per expert and layer; layers with the least fed expert first."""
    facts = fidelity.experts
    columns = ("block", ">experts", ">fewest tokens", ">median", ">most", ">under-calibrated")
    if facts is None or not facts.layers:
        return Table(title="Calibration tokens per expert", columns=columns, rows=())
    layers = sorted((row for row in facts.layers if row.tokens), key=lambda row: min(row.tokens))[
        :limit
    ]
    rows = tuple(
        (
            row.block,
            str(len(row.tokens)),
            format_numbers.format_count(min(row.tokens)),
            format_numbers.format_count(round(median(row.tokens))),
            format_numbers.format_count(max(row.tokens)),
            str(sum(tokens < facts.min_tokens for tokens in row.tokens)),
        )
        for row in layers
    )
    low = facts.uncalibrated()
    named = ", ".join(
        f"{block} expert {expert} ({tokens:,})" for block, expert, tokens in low[:limit]
    )
    note = f"{len(low)} of {sum(len(row.tokens) for row in facts.layers):,} experts saw fewer than {facts.min_tokens} "
    note += f"tokens and got {facts.policy}: {named}{_more(len(low), limit)}." if low else "tokens."
    return Table(title="Calibration tokens per expert", columns=columns, rows=rows, note=note)


def make_fallback_table(fidelity: Fidelity) -> Table:
    """Every named rule that took over, how often, and for what."""
    rows = tuple(
        (
            row.kind,
            format_numbers.format_count(len(row.modules)),
            row.meaning,
            ", ".join(row.modules[:EXAMPLES]) + _more(len(row.modules), EXAMPLES),
        )
        for row in fidelity.fallbacks
    )
    return Table(
        title="Fallbacks", columns=("kind", ">modules", "what happened", "where"), rows=rows
    )


def make_text_table(fidelity: Fidelity) -> Table:
    """What was calibrated on and what was measured on."""
    pairs = (("calibration", fidelity.calibration), ("measured on", fidelity.measured_on))
    rows = tuple(
        (
            use,
            f"{text.set}: {text.description}" if text.description else text.set,
            f"{text.sequences:,} x {text.length:,}",
            format_numbers.format_count(text.tokens),
            text.license,
            text.sha256[:12],
        )
        for use, text in pairs
        if text is not None
    )
    columns = ("use", "set", ">sequences", ">tokens", "licence", "sha256")
    return Table(title="Text", columns=columns, rows=rows)


def make_origin_table(fidelity: Fidelity) -> Table:
    """Versions, seeds and hashes: what to have to make the same bytes again."""
    pairs = [
        ("source", fidelity.source.model),
        ("source revision", fidelity.source.revision or format_numbers.MISSING),
    ]
    pairs += [("source sha256", fidelity.source.hash)]
    pairs += [(f"{name} sha256", value) for name, value in fidelity.hashes.items()]
    pairs += [
        (f"{row.task} data sha256", row.data_sha256)
        for row in fidelity.benchmarks
        if row.data_sha256
    ]
    pairs += [(name, value) for name, value in fidelity.versions.items()]
    pairs += [(f"seed, {name}", str(value)) for name, value in fidelity.seeds.items()]
    return Table(title="Origin", columns=("what", "value"), rows=tuple(pairs))


def _rates(what: str, pairs: Sequence[tuple[str, tuple[float | None, float | None] | None]]) -> str:
    """A sentence on the tasks where a rate is not zero on both sides: source -> artifact."""
    told = [
        f"{task} {format_numbers.format_percent(rate[0], 1)} -> {format_numbers.format_percent(rate[1], 1)}"
        for task, rate in pairs
        if rate and any(rate)
    ]
    return f" {what}: {', '.join(told)}." if told else ""


def _badness(row: ModuleResult) -> tuple[bool, float]:
    known = (
        row.output_relative_error if row.output_relative_error is not None else row.relative_error
    )
    return row.output_relative_error is not None, _rank(known, missing=-1.0)


def _rank(value: float | None, missing: float) -> float:
    return missing if value is None else value


def _finite(share: float | None) -> str:
    """A figure that is always measured."""
    return NOT_FINITE if share is None else format_numbers.format_percent(share)


def _more(total: int, shown: int) -> str:
    return f" and {total - shown:,} more" if total > shown else ""


def make_tables(fidelity: Fidelity) -> Sequence[Table]:
    """All of them in the order of a report; empty ones left out."""
    made = (
        make_benchmark_table(fidelity), make_distribution_table(fidelity), make_likelihood_table(fidelity), make_gate_table(fidelity), make_role_table(fidelity),
        make_text_table(fidelity), make_module_table(fidelity), make_block_table(fidelity), make_router_table(fidelity), make_expert_table(fidelity),
        make_fallback_table(fidelity),
    )  # fmt: skip
    return [table for table in made if table.rows]
