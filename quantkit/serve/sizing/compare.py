"""Comparison of models: size, GPUs, computed bounds, and the figures of their fidelity reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.layout import MANIFEST
from quantkit.artifact.read_report import read_sealed_report
from quantkit.report import format_numbers
from quantkit.report.table import Table
from quantkit.serve.sizing.fit import Fit
from quantkit.serve.sizing.memory import format_users
from quantkit.serve.sizing.roofline import Bounds, count_active_bytes
from quantkit.serve.sizing.tables import (
    BOUND_NOTE,
    format_column_note,
    format_parallelism,
    format_rate,
)


@dataclass(frozen=True, kw_only=True)
class SizedModel:
    """One of the compared models. fidelity: None without a report."""

    name: str
    fit: Fit
    bounds: Bounds | None
    fidelity: Fidelity | None


def find_report(target: str) -> Fidelity | None:
    """Return the fidelity report of an artifact, or None; ArtifactError for a damaged one."""
    folder = Path(target)
    return read_sealed_report(folder)[0] if (folder / MANIFEST).is_file() else None


def make_size_table(models: Sequence[SizedModel]) -> Table:
    """Make the table of storage and memory."""
    first = models[0].fit.memory
    rows = []
    for entry in models:
        memory = entry.fit.memory
        rows.append((
            entry.name,
            memory.model.scheme,
            format_numbers.format_parameters(memory.model.weights.parameters),
            format_numbers.format_size(memory.weights_bytes),
            f"{memory.weights_bytes / first.weights_bytes:.3f}",
            format_numbers.format_size(round(count_active_bytes(memory.model))),
            format_numbers.format_size(memory.kv_bytes),
            format_numbers.format_size(memory.total_bytes),
        ))
    columns = (
        "model",
        "stored",
        ">parameters",
        ">weights",
        ">of first",
        ">per token",
        ">KV cache",
        ">total",
    )
    note = f"{format_users(first.users)} at up to {first.context:,} tokens, margin "
    note += f"{100 * first.margin:g} %; per token: weights that one token reads."
    return Table(title="Sizes", columns=columns, rows=tuple(rows), note=note)


def make_speed_table(models: Sequence[SizedModel]) -> Table:
    """Make the table of the GPUs of one kind that each model needs, and of its bounds on them."""
    rows = []
    for entry in models:
        placement, bounds = entry.fit.placement, entry.bounds
        if placement is None or bounds is None:
            rows.append((entry.name, f"no: {entry.fit.min_gpus}+", *("-",) * 6))
            continue
        rows.append((
            entry.name,
            str(placement.gpus),
            format_parallelism(placement),
            format_numbers.format_count(entry.fit.max_context),
            format_numbers.format_count(entry.fit.max_users),
            format_rate(bounds.one),
            format_rate(bounds.all),
            format_rate(bounds.prefill),
        ))
    columns = (
        "model",
        ">GPUs",
        "split",
        ">context",
        ">users",
        ">1 user t/s",
        ">all t/s",
        ">prefill t/s",
    )
    fit = models[0].fit
    note = BOUND_NOTE + format_column_note(fit.memory)
    return Table(title=f"On {fit.gpu.short}", columns=columns, rows=tuple(rows), note=note)


def make_fidelity_table(models: Sequence[SizedModel]) -> Table | None:
    """Make the table of the reports' figures; None without a report."""
    reports = [entry.fidelity for entry in models if entry.fidelity]
    if not reports:
        return None
    tasks = list(dict.fromkeys(row.task for report in reports for row in report.benchmarks))
    columns = (
        "model",
        "compared with",
        ">KL mean",
        ">ppl ratio",
        ">top-1",
        *(f">{task}" for task in tasks),
    )
    has_several_sources = len({report.source.hash for report in reports}) > 1
    return Table(
        title="Fidelity",
        columns=columns,
        rows=tuple(_make_fidelity_row(entry, tasks) for entry in models),
        note="Different sources: KL and perplexity are not comparable across them."
        if has_several_sources
        else "",
    )


def _make_fidelity_row(entry: SizedModel, tasks: Sequence[str]) -> tuple[str, ...]:
    report = entry.fidelity
    if report is None:
        return (entry.name, "no report", *(format_numbers.MISSING,) * (3 + len(tasks)))
    pooled = next((row for row in report.distribution if row.domain == "all"), None)
    scores = {row.task: format_numbers.format_percent(row.artifact, 1) for row in report.benchmarks}
    figures = (
        (
            format_numbers.format_figure(pooled.figures["kl_mean"], "nats"),
            format_numbers.format_figure(pooled.figures["ppl_ratio"], "ratio"),
            format_numbers.format_figure(pooled.figures["top1"], "percent"),
        )
        if pooled
        else (format_numbers.MISSING,) * 3
    )
    return (
        entry.name,
        report.source.model,
        *figures,
        *(scores.get(task, format_numbers.MISSING) for task in tasks),
    )
