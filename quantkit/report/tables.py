"""The tables of a report as text, shared by the model card, the page and the terminal. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

from quantkit.artifact.fidelity_schema import BenchmarkResult, Fidelity, ModuleResult, TaskOverlap
from quantkit.artifact.layout import FIDELITY
from quantkit.figures import (
    ALL_TEXT,
    LOW_COVERAGE,
    NOT_FINITE,
    find_figure,
    is_size,
    list_figures,
    list_seen_kinds,
)
from quantkit.report import format_numbers

WORST = 10
EXAMPLES = 3
MORE = FIDELITY


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under named columns.

    A column whose name starts with ">" holds numbers and is aligned right.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def make_benchmark_table(fidelity: Fidelity) -> Table:
    """Return the scores of source and artifact by task, paired item by item."""
    return make_comparison_table(fidelity.benchmarks, "Greedy, the same prompts on both")


def make_comparison_table(results: Sequence[BenchmarkResult], how: str) -> Table:
    """Return two models' scores on the same items; `how` describes how both generated answers."""
    rows: list[tuple[str, ...]] = []
    for row in results:
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
    note = f"{how}; p is McNemar's exact test on the changed items."
    note += _format_rates("Cut at the token limit", [(row.task, row.truncated) for row in results])
    note += _format_rates("Without a result", [(row.task, row.unparsed) for row in results])
    return Table(title="Benchmarks", columns=columns, rows=tuple(rows), note=note if rows else "")


def make_distribution_table(fidelity: Fidelity) -> Table:
    """Return the figures of the next-token distributions: a row per figure, a column per domain."""
    domains = fidelity.distribution
    rows: list[tuple[str, ...]] = (
        [("tokens", *(format_numbers.format_count(row.tokens) for row in domains))]
        if domains
        else []
    )
    seen = list_seen_kinds(fidelity)
    if seen is not None and domains:
        rows.append(("calibrated on", *(_describe_exposure(row.domain, seen) for row in domains)))
    for figure in list_figures():
        readings = [figure.read(fidelity, row.domain) for row in domains]
        if figure.scope == "domain" and any(reading.is_measured for reading in readings):
            cells = (format_numbers.format_reading(figure, reading) for reading in readings)
            rows.append((figure.label, *cells))
    return Table(
        title="Next-token distributions",
        columns=("figure", *(f">{row.domain}" for row in domains)),
        rows=tuple(rows),
        note=f"Against {fidelity.source.baseline}; ± is one standard error."
        f"{_format_kinds(fidelity)}"
        if rows
        else "",
    )


def _describe_exposure(label: str, seen: Collection[str]) -> str:
    """Return whether calibration had text of a kind."""
    if label == ALL_TEXT:
        return format_numbers.MISSING
    return "seen" if label in seen else "unseen"


def _format_kinds(fidelity: Fidelity) -> str:
    """Return sentences with the worst kind, the mean over kinds and the shift, if measured."""
    sentences = ""
    for key in ("kl_worst_kind", "kl_mean_kinds", "shift"):
        figure = find_figure(key)
        reading = figure.read(fidelity) if figure else None
        if figure and reading and reading.value is not None:
            kind = f" ({reading.reason})" if reading.reason else ""
            value = format_numbers.format_reading(figure, reading)
            sentences += f" {figure.label}: {value}{kind}."
    return sentences


def make_likelihood_table(fidelity: Fidelity) -> Table:
    """Return the log-likelihood of gold solutions by task, paired item by item."""
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
    skipped = (
        f" {row.task} was not run: {row.reason}."
        for row in fidelity.likelihood
        if row.status == "not run"
    )
    note = (
        "Log-likelihood of a correct answer after its prompt, nats per token; nothing is generated."
    )
    return Table(
        title="Gold solutions (teacher-forced)",
        columns=("task", ">items", ">tokens", ">source", ">artifact", ">difference [95 % CI]"),
        rows=rows,
        note=note + "".join(skipped) if rows else "",
    )


def make_gate_table(fidelity: Fidelity) -> Table:
    """Return every bound of the recipe with its result."""
    words = {True: "pass", False: "FAIL", None: "not judged"}
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
    """Return the number of quantized and kept layers by role, with the reason."""
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
    columns = ("layers", ">quantized", ">kept", ">parameters", "stored as", "reason")
    return Table(title="Quantized layers", columns=columns, rows=rows)


def make_module_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Return the quantized matrices with the largest relative output error.

    Matrices without output error come after them, by their weight error.
    """
    quantized = [row for row in fidelity.modules if row.method is not None]
    worst = sorted(quantized, key=_rank_module, reverse=True)[:limit]
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
        title="Relative error of weights and outputs, worst modules",
        columns=columns,
        rows=rows,
        note=note,
    )


def make_block_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Return the relative error of the hidden states after a block, largest first."""
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
    """Return the share of expert choices that agree with the source's, lowest first."""
    lowest = sorted(fidelity.routers, key=lambda row: _rank(row.agreement, missing=-1.0))[:limit]
    rows = tuple((row.block, _finite(row.agreement)) for row in lowest)
    note = (
        f"The {len(rows)} lowest of {len(fidelity.routers)} layers."
        if len(rows) < len(fidelity.routers)
        else ""
    )
    return Table(title="Router agreement", columns=("block", ">same experts"), rows=rows, note=note)


def make_expert_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Return the calibration tokens per expert by layer, the layer with the lowest minimum
    first."""
    coverage = fidelity.experts
    columns = ("block", ">experts", ">min tokens", ">median", ">max", ">under-calibrated")
    if coverage is None or not coverage.layers:
        return Table(title="Calibration tokens per expert", columns=columns, rows=())
    layers = sorted(
        (row for row in coverage.layers if row.tokens), key=lambda row: min(row.tokens)
    )[:limit]
    rows = tuple(
        (
            row.block,
            str(len(row.tokens)),
            format_numbers.format_count(min(row.tokens)),
            format_numbers.format_count(round(median(row.tokens))),
            format_numbers.format_count(max(row.tokens)),
            str(sum(tokens < coverage.min_tokens for tokens in row.tokens)),
        )
        for row in layers
    )
    low = coverage.list_uncalibrated()
    examples = ", ".join(
        f"{block} expert {expert} ({tokens:,})" for block, expert, tokens in low[:limit]
    )
    note = (
        f"{len(low)} of {sum(len(row.tokens) for row in coverage.layers):,} experts "
        f"saw fewer than {coverage.min_tokens} "
    )
    note += (
        f"tokens and got {coverage.policy}: {examples}{_more(len(low), limit)}."
        if low
        else "tokens."
    )
    return Table(title="Calibration tokens per expert", columns=columns, rows=rows, note=note)


def make_coverage_table(fidelity: Fidelity, limit: int = WORST) -> Table:
    """Return the kinds of text that calibration does not cover, each at its worst input."""
    seen = list_seen_kinds(fidelity) or frozenset()
    low = [
        (share, kind, place)
        for kind, (share, place) in fidelity.find_worst_inputs().items()
        if share is not None and share > 1 - LOW_COVERAGE
    ]
    low.sort(key=lambda row: -row[0])
    rows = tuple(
        (
            f"{kind} ({_describe_exposure(kind, seen)})",
            place.input,
            format_numbers.format_percent(share, 1),
            format_numbers.format_digits(place.effective_rank),
            format_numbers.format_count(place.channels),
        )
        for share, kind, place in low[:limit]
    )
    note = ""
    if low:
        share, kind, place = low[0]
        percent = format_numbers.format_percent(share, 0)
        note = f"The text {kind} has {percent} of its energy at {place.input} outside of what "
        note += "calibration covers. Add text of this kind to the calibration set."
    columns = ("text", "at the input of", ">outside", ">rank", ">channels")
    title = "Text that calibration does not cover"
    return Table(title=title, columns=columns, rows=rows, note=note)


def make_fallback_table(fidelity: Fidelity) -> Table:
    """Return every fallback in use with its number of modules."""
    rows = tuple(
        (
            row.kind,
            format_numbers.format_count(len(row.modules)),
            row.meaning,
            ", ".join(row.modules[:EXAMPLES]) + _more(len(row.modules), EXAMPLES),
        )
        for row in fidelity.fallbacks
    )
    return Table(title="Fallbacks", columns=("kind", ">modules", "meaning", "examples"), rows=rows)


def make_text_table(fidelity: Fidelity) -> Table:
    """Return the calibration text and the fidelity text."""
    pairs = (("calibration", fidelity.calibration), ("fidelity", fidelity.measured_on))
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
    columns = ("use", "set", ">sequences", ">tokens", "license", "sha256")
    note = _format_overlaps(fidelity.calibration.overlaps) if fidelity.calibration else ""
    return Table(title="Texts", columns=columns, rows=rows, note=note)


def _format_overlaps(overlaps: Sequence[TaskOverlap]) -> str:
    """Return a sentence on the benchmark prompts in the calibration text."""
    checked = [f"{row.task} {row.overlapping:,} of {row.items:,}" for row in overlaps if row.items]
    missing = [f"{row.task} ({row.reason})" for row in overlaps if not row.items]
    sentences = [
        f"Benchmark prompts in the calibration text: {', '.join(checked)}." if checked else "",
        f"Not checked: {', '.join(missing)}." if missing else "",
    ]
    return " ".join(filter(None, sentences))


def make_part_table(fidelity: Fidelity) -> Table:
    """Return the parts of mixtures: what each contributed to calibration and fidelity text."""
    pairs = (("calibration", fidelity.calibration), ("fidelity", fidelity.measured_on))
    rows = tuple(
        (
            use,
            f"{part.name}: {part.description}" if part.description else part.name,
            part.kind,
            part.language,
            f"{part.sequences:,}",
            format_numbers.format_count(part.tokens)
            + (
                f" ({format_numbers.format_count(part.answers)} of answers)"
                if part.answers is not None
                else ""
            ),
            part.license,
            part.sha256[:12],
        )
        for use, text in pairs
        if text is not None
        for part in text.parts
    )
    columns = ("use", "part", "kind", "language", ">sequences", ">tokens", "license", "sha256")
    return Table(title="Parts of the texts", columns=columns, rows=rows)


def make_origin_table(fidelity: Fidelity) -> Table:
    """Return versions, seeds and hashes: the conditions for the same bytes."""
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
    return Table(title="Provenance", columns=("item", "value"), rows=tuple(pairs))


def _format_rates(
    label: str, pairs: Sequence[tuple[str, tuple[float | None, float | None] | None]]
) -> str:
    """Return a sentence with the tasks whose rate is not zero on both sides: source -> artifact."""
    rates = [
        f"{task} {format_numbers.format_percent(rate[0], 1)} -> "
        f"{format_numbers.format_percent(rate[1], 1)}"
        for task, rate in pairs
        if rate and any(rate)
    ]
    return f" {label}: {', '.join(rates)}." if rates else ""


def _rank_module(row: ModuleResult) -> tuple[bool, float]:
    error = (
        row.output_relative_error if row.output_relative_error is not None else row.relative_error
    )
    return row.output_relative_error is not None, _rank(error, missing=-1.0)


def _rank(value: float | None, missing: float) -> float:
    return missing if value is None else value


def _finite(share: float | None) -> str:
    """Return a share that was measured; None is one that is not finite."""
    return NOT_FINITE if share is None else format_numbers.format_percent(share)


def _more(total: int, shown: int) -> str:
    return f" and {total - shown:,} more" if total > shown else ""


def make_tables(fidelity: Fidelity) -> Sequence[Table]:
    """Return all tables with rows, in the order of a report."""
    tables = (
        make_benchmark_table(fidelity),
        make_distribution_table(fidelity),
        make_likelihood_table(fidelity),
        make_gate_table(fidelity),
        make_role_table(fidelity),
        make_text_table(fidelity),
        make_part_table(fidelity),
        make_module_table(fidelity),
        make_block_table(fidelity),
        make_router_table(fidelity),
        make_expert_table(fidelity),
        make_coverage_table(fidelity),
        make_fallback_table(fidelity),
    )
    return [table for table in tables if table.rows]
