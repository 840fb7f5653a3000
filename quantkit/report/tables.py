"""The tables of a report as text, shared by the model card, the page and the terminal. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.artifact.fidelity_schema import (
    BenchmarkResult,
    DistributionResult,
    Fidelity,
    TaskOverlap,
)
from quantkit.figure_readers import list_seen_kinds
from quantkit.figures import find_figure, list_figures
from quantkit.report import format_numbers
from quantkit.report.definitions import define_columns, define_figures
from quantkit.report.error_tables import (
    make_block_table,
    make_coverage_table,
    make_expert_table,
    make_fallback_table,
    make_module_table,
    make_router_table,
)
from quantkit.report.table import Table
from quantkit.report.token_tables import make_token_table

KIND_FIGURES = ("kl_mean", "kl_p99", "ppl_ratio", "top1")
"""Columns of the table with a row per kind of text."""
MOST_COLUMNS = 4
"""Kinds of text, all text included, up to which each has a column and not a row."""
HEADROOM = (
    "Distance of the value from its bound, as a share of an upper bound, else in the figure's "
    "unit; negative is a miss."
)
LIKELIHOOD = {
    "source": "Log-likelihood per token of the solutions under the source, mean over items.",
    "artifact": "The same under the artifact.",
    "difference": "Artifact - source, paired item by item; negative is worse.",
}


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
            "; ".join(filter(None, ["not valid" if row.fault else "", row.verdict])),
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
    note += describe_pass(results)
    note += "".join(f" Not valid: {row.fault}." for row in results if row.fault)
    note += _format_rates("Cut at the token limit", [(row.task, row.truncated) for row in results])
    note += _format_rates("Without a result", [(row.task, row.unparsed) for row in results])
    return Table(
        title="Benchmarks",
        columns=columns,
        rows=tuple(rows),
        note=note if rows else "",
        meanings=define_columns(columns),
    )


def describe_pass(results: Sequence[BenchmarkResult]) -> str:
    """Return a sentence on the loss that "pass" and "fail" refer to; "" without such verdicts."""
    required = dict.fromkeys(row.required for row in results if row.required is not None)
    losses = " or ".join(f"{100 * (1 - share):.3g} %" for share in required)
    if not losses:
        return ""
    return (
        f' "pass": the interval excludes a loss of more than {losses} of the source\'s score; '
        '"fail": it lies beyond that loss.'
    )


def make_distribution_table(fidelity: Fidelity) -> Table:
    """Return the figures of the next-token distributions: a row per figure, a column per domain.

    Of many kinds of text only all text has a column; `make_kind_table` has a row for each.
    """
    domains = list_column_domains(fidelity)
    rows = list[tuple[str, ...]]()
    seen = list_seen_kinds(fidelity)
    if domains:
        counts = (format_numbers.format_count(row.tokens) for row in domains)
        rows.append(("tokens", *counts))
    if seen is not None and len(domains) > 1:
        exposures = (format_numbers.format_exposure(row.domain, seen) for row in domains)
        rows.append(("calibrated on", *exposures))
    meanings = dict[str, str]()
    for figure in list_figures():
        readings = [figure.read(fidelity, row.domain) for row in domains]
        if figure.scope != "domain" or not any(reading.is_measured for reading in readings):
            continue
        power = format_numbers.choose_power(figure, readings)
        label = format_numbers.add_power(figure.label, power)
        rows.append((
            label,
            *(format_numbers.format_reading(figure, reading, power) for reading in readings),
        ))
        meanings[label] = figure.meaning
    return Table(
        title="Next-token distributions",
        columns=("figure", *(f">{row.domain}" for row in domains)),
        rows=tuple(rows),
        note=f"Against {fidelity.source.baseline}. {format_numbers.INTERVALS}"
        f"{_format_repeated(fidelity)}{_format_kinds(fidelity)}"
        if rows
        else "",
        meanings=tuple(meanings.items()),
    )


def list_column_domains(fidelity: Fidelity) -> Sequence[DistributionResult]:
    """Return the domains that have a column: all of a few, and all text of many."""
    rows = fidelity.distribution
    return rows if len(rows) <= MOST_COLUMNS else rows[:1]


def make_kind_table(fidelity: Fidelity) -> Table:
    """Return the main figures with a row per kind of text, if there are many kinds."""
    rows, seen = fidelity.distribution, list_seen_kinds(fidelity)
    kinds = rows if len(rows) > MOST_COLUMNS else ()
    figures = [figure for key in KIND_FIGURES if (figure := find_figure(key))]
    readings = {f.key: [f.read(fidelity, row.domain) for row in kinds] for f in figures}
    powers = {f.key: format_numbers.choose_power(f, readings[f.key]) for f in figures}
    headings = [format_numbers.add_power(f.label, powers[f.key]) for f in figures]
    cells = tuple(
        (
            row.domain,
            *(() if seen is None else (format_numbers.format_exposure(row.domain, seen),)),
            format_numbers.format_count(row.tokens),
            *(format_numbers.format_reading(f, readings[f.key][n], powers[f.key]) for f in figures),
        )
        for n, row in enumerate(kinds)
    )
    exposure = () if seen is None else ("calibrated",)
    return Table(
        title="By kind of text",
        columns=("text", *exposure, ">tokens", *(f">{name}" for name in headings)),
        rows=cells,
        meanings=tuple(zip(headings, (f.meaning for f in figures), strict=True)),
    )


def _format_repeated(fidelity: Fidelity) -> str:
    """Return a sentence on tokens that repeat the beginning of another document, if there are."""
    text = fidelity.measured_on
    if text is None or not text.repeated or not fidelity.distribution:
        return ""
    return (
        f" {text.repeated:,} of the {fidelity.distribution[0].tokens:,} tokens repeat the "
        "beginning of another document; the intervals count them as tokens of one document."
    )


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
    columns = ("task", ">items", ">tokens", ">source", ">artifact", ">difference [95 % CI]")
    return Table(
        title="Gold solutions (teacher-forced)",
        columns=columns,
        rows=rows,
        note=note + "".join(skipped) if rows else "",
        meanings=define_columns(columns, LIKELIHOOD),
    )


def make_gate_table(fidelity: Fidelity) -> Table:
    """Return every bound of the recipe with value, interval, number of samples, and outcome."""
    rows = tuple(
        (
            row.figure,
            row.bound,
            format_numbers.format_gate_value(row),
            format_numbers.format_headroom(row),
            format_numbers.format_count(row.n),
            f"{row.outcome}: {row.reason}" if row.reason else row.outcome,
        )
        for row in fidelity.gates
    )
    has_unproven = any(row.is_unproven for row in fidelity.gates)
    note = (
        "Kept, not proven: the figure keeps its bound and its interval crosses it; more text or "
        "items decide. gates: {proven: true} makes it a miss."
    )
    return Table(
        title="Gates",
        columns=("figure", ">bound", ">value [95 % CI]", ">headroom", ">n", "result"),
        rows=rows,
        note=note if has_unproven else "",
        meanings=(
            ("headroom", HEADROOM),
            *define_figures(row.figure for row in fidelity.gates),
        )
        if rows
        else (),
    )


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
    pairs += [("source tensors", fidelity.source_tensors)] if fidelity.source_tensors else []
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


def make_tables(fidelity: Fidelity) -> Sequence[Table]:
    """Return all tables with rows, in the order of a report."""
    tables = (
        make_benchmark_table(fidelity),
        make_distribution_table(fidelity),
        make_kind_table(fidelity),
        make_token_table(fidelity),
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
