"""Models side by side: size, cards, computed bounds, and the fidelity figures of those that have a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.layout import MANIFEST
from quantkit.artifact.read_report import read_sealed_report
from quantkit.report import format_numbers
from quantkit.report.tables import Table
from quantkit.serve.sizing.fit import Fit
from quantkit.serve.sizing.memory import told_users
from quantkit.serve.sizing.roofline import Bounds, active_bytes
from quantkit.serve.sizing.tables import BOUND, rate, told_asked


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One of the models that are compared."""

    name: str
    fit: Fit
    bounds: Bounds | None
    fidelity: Fidelity | None  # None: no report lies beside it


def find_report(target: str) -> Fidelity | None:
    """The fidelity report of an artifact; None for what has none. ArtifactError for a damaged one."""
    folder = Path(target)
    return read_sealed_report(folder)[0] if (folder / MANIFEST).is_file() else None


def make_size_table(sides: Sequence[ComparedModel]) -> Table:
    """What each is and takes."""
    rows = []
    for side in sides:
        needs = side.fit.needs
        rows.append((
            side.name,
            needs.model.scheme,
            format_numbers.format_parameters(needs.model.weights.parameters),
            format_numbers.format_size(needs.weights_bytes),
            f"{needs.weights_bytes / sides[0].fit.needs.weights_bytes:.3f}",
            format_numbers.format_size(round(active_bytes(needs.model))),
            format_numbers.format_size(needs.kv_bytes),
            format_numbers.format_size(needs.total_bytes),
        ))
    columns = (
        "model",
        "stored",
        ">parameters",
        ">weights",
        ">of first",
        ">per token",
        ">KV cache",
        ">in all",
    )
    first = sides[0].fit.needs
    note = f"{told_users(first.users)} at up to {first.context:,} tokens, margin {100 * first.margin:g} %; "
    note += "per token: weights that one token alone reads."
    return Table(title="Sizes", columns=columns, rows=tuple(rows), note=note)


def make_speed_table(sides: Sequence[ComparedModel]) -> Table:
    """Cards of one kind that each takes, and bounds on them."""
    rows = []
    for side in sides:
        placement, made = side.fit.placement, side.bounds
        if placement is None or made is None:
            rows.append((side.name, f"no: {side.fit.least_cards}+", *("-",) * 6))
            continue
        split = f"TP{placement.tp}" + (f" x PP{placement.pp}" if placement.pp > 1 else "")
        told = (
            str(placement.cards),
            split,
            format_numbers.format_count(side.fit.max_context),
            format_numbers.format_count(side.fit.max_users),
        )
        rows.append((side.name, *told, rate(made.one), rate(made.all), rate(made.prefill)))
    note = BOUND + told_asked(sides[0].fit.needs)
    columns = (
        "model",
        ">cards",
        "split",
        ">context",
        ">users",
        ">1 user t/s",
        ">all t/s",
        ">prefill t/s",
    )
    return Table(
        title=f"On {sides[0].fit.card.short}", columns=columns, rows=tuple(rows), note=note
    )


def make_fidelity_table(sides: Sequence[ComparedModel]) -> Table | None:
    """Figures of the reports; None where nobody has one."""
    told = [side for side in sides if side.fidelity]
    if not told:
        return None
    tasks = list(
        dict.fromkeys(
            row.task for side in told if side.fidelity for row in side.fidelity.benchmarks
        )
    )
    rows = []
    for side in sides:
        report = side.fidelity
        pooled = (
            next((row for row in report.distribution if row.domain == "all"), None)
            if report
            else None
        )
        scores = (
            {row.task: format_numbers.format_percent(row.artifact, 1) for row in report.benchmarks}
            if report
            else {}
        )
        figures = (
            (
                format_numbers.format_figure(pooled.figures["kl_mean"], "nats"),
                format_numbers.format_figure(pooled.figures["ppl_ratio"], "ratio"),
                format_numbers.format_figure(pooled.figures["top1"], "percent"),
            )
            if pooled
            else (format_numbers.MISSING,) * 3
        )
        source = report.source.model if report else "no report"
        rows.append((
            side.name,
            source,
            *figures,
            *(scores.get(task, format_numbers.MISSING) for task in tasks),
        ))
    columns = (
        "model",
        "compared with",
        ">KL mean",
        ">ppl ratio",
        ">top-1",
        *(f">{task}" for task in tasks),
    )
    sources = {side.fidelity.source.hash for side in told if side.fidelity}
    note = (
        "Against different sources: KL and perplexity do not compare across them."
        if len(sources) > 1
        else ""
    )
    return Table(title="Fidelity", columns=columns, rows=tuple(rows), note=note)
