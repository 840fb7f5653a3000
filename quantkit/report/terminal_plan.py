"""Plans for a terminal, as rich renderables. Nothing is printed here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from quantkit.plan.plan_schema import (
    PlanEngine,
    PlanMemory,
    PlanStream,
    PlanSummary,
    PlanTasks,
    PlanTime,
)
from quantkit.progress import format_duration
from quantkit.report import format_numbers
from quantkit.report.short_form import LabeledLines, SummaryLine, escape_line
from quantkit.report.table import Table
from quantkit.report.terminal_tables import render_table, strip_control_characters
from quantkit.texts.exposure import format_labels

SHARDS = 4  # output files that a plan shows


def render_plan(plan: PlanSummary) -> Group:
    """Return a plan: source, rules, totals, memory, shards, warnings."""
    source = plan.source
    head = Text(strip_control_characters(f"{source.model} -> {plan.output}"), style="bold")
    revision = f" at {source.revision}" if source.revision else ""
    weights, bare = (
        format_numbers.format_parameters(source.parameters),
        source.parameters_without_mtp,
    )
    mtp = (
        f" ({format_numbers.format_parameters(bare)} without the MTP layer)"
        if bare is not None
        else ""
    )
    facts = f"{source.architecture}{revision}, {weights} parameters{mtp}, {source.dtype}, "
    facts += f"{format_numbers.format_size(source.bytes)}; read from {source.read_from}"
    if source.compared_with not in ("", source.dtype):
        facts += f"; compared with the {source.compared_with}"
    head.append("\n" + strip_control_characters(facts), style="not bold")
    totals = plan.totals
    size = format_numbers.format_size_change(totals.bytes_before, totals.bytes_after)
    head.append(f"\n{size}; {totals.bits_per_weight:.2f} bits per weight overall", style="not bold")
    if source.code:
        code = f"code carried over, not run: {', '.join(source.code)}"
        head.append("\n" + strip_control_characters(code), style="not bold")
    if plan.copied:
        parts = format_numbers.format_parts(plan.copied)
        how = format_numbers.describe_copy(plan.copied)
        copied = f"{how}: {parts}; {format_numbers.TEXT_ONLY}"
        head.append("\n" + strip_control_characters(copied), style="not bold")
    for text in (*plan.sampled, *plan.costs):
        head.append("\n" + strip_control_characters(text), style="not bold")
    warnings = [
        Text(strip_control_characters(f"warning: {warning}"), style="yellow")
        for warning in plan.warnings
    ]
    return Group(
        head,
        Text(),
        render_table(make_rules_table(plan)),
        render_table(make_shards_table(plan)),
        *((render_table(make_texts_table(plan)),) if plan.texts else ()),
        LabeledLines(list_plan_lines(plan)),
        *warnings,
    )


# ------------------------------------------------------------------------------- lines with a label


def list_plan_lines(plan: PlanSummary) -> list[SummaryLine]:
    """Return texts, benchmarks, gates, engines, memory, scratch disk and time of a plan."""
    lines = [
        SummaryLine(label=stream.use, wordings=(describe_stream(stream),))
        for stream in plan.streams
    ]
    if plan.tasks.names:
        lines.append(SummaryLine(label="benchmarks", wordings=(describe_tasks(plan.tasks),)))
    if plan.gates:
        lines.append(SummaryLine(label="gates", wordings=("; ".join(plan.gates),)))
    if plan.engines:
        lines.append(SummaryLine(label="loads in", wordings=(describe_engines(plan.engines),)))
    memory = plan.memory
    style = "" if memory.peak <= memory.budget else "bold red"
    lines.append(SummaryLine(label="memory", wordings=(describe_memory(memory),), style=style))
    scratch = format_numbers.format_size(memory.scratch_disk)
    reason = f": {memory.scratch_reason}" if memory.scratch_reason else ""
    lines.append(SummaryLine(label="scratch", wordings=(f"{scratch}{reason}",)))
    if plan.time is not None:
        lines.append(SummaryLine(label="time", wordings=(describe_time(plan.time),)))
    return [escape_line(line) for line in lines]


def describe_stream(stream: PlanStream) -> str:
    """Return "tiny-v3, 49,697 tokens, all of the set in sequences of at most 512"."""
    tokens = f"{'' if stream.is_counted else 'at most '}{stream.tokens:,} tokens"
    sequences = "all" if stream.sequences is None else f"{stream.sequences:,}"
    return f"{stream.set}: {tokens} in {sequences} sequences of at most {stream.length:,}"


def describe_tasks(tasks: PlanTasks) -> str:
    """Return the names of the benchmarks and their numbers of items."""
    items = "all items" if tasks.limit is None else f"the first {tasks.limit:,} items of each"
    gold = f", gold solutions of {tasks.gold_solutions:,}" if tasks.gold_solutions else ""
    return f"{', '.join(tasks.names)} ({items}{gold})"


def describe_engines(engines: Sequence[PlanEngine]) -> str:
    """Return the engines that load the artifact, with tried versions, then those that do not."""
    loads = [
        f"{row.engine} (tried: {row.tried})" if row.tried else row.engine
        for row in engines
        if row.is_supported
    ]
    refused = [row.engine for row in engines if not row.is_supported]
    return "; ".join([", ".join(loads), *([f"not {', '.join(refused)}"] if refused else [])])


def describe_memory(memory: PlanMemory) -> str:
    """Return the peak, the budget, the experts at a time, and the parts of the peak."""
    waves = f", {memory.experts_per_wave} experts per wave" if memory.experts_per_wave else ""
    parts = ", ".join(
        f"{name} {format_numbers.format_size(n_bytes)}" for name, n_bytes in memory.parts.items()
    )
    peak, budget = map(format_numbers.format_size, (memory.peak, memory.budget))
    return f"{peak} of {budget}{waves}{f' ({parts})' if parts else ''}"


def describe_time(time: PlanTime) -> str:
    """Return "about 4 min (quantize 3 min, benchmarks 1 min), scaled from ...", or why not."""
    if time.seconds is None:
        return f"not known: {time.reason}"
    steps = ", ".join(
        f"{name} {format_duration(seconds)}"
        for name, seconds in time.steps.items()
        if seconds >= 0.05 * time.seconds
    )
    return f"about {format_duration(time.seconds)} ({steps}), {time.reason}"


def render_plans(plans: Sequence[PlanSummary]) -> Group:
    """Return the plans of a recipe with several formats: the first in full, the others'
    differences."""
    first, lines = plans[0], list[Text]()
    for plan in plans[1:]:
        summary = (
            f"and {plan.output}: {format_numbers.format_size(plan.totals.bytes_after)} in "
            f"{len(plan.shards)} files"
        )
        lines.append(Text(strip_control_characters(summary), style="bold"))
        new = [warning for warning in plan.warnings if warning not in first.warnings]
        lines += [
            Text(strip_control_characters(f"warning: {warning}"), style="yellow") for warning in new
        ]
    return Group(render_plan(first), *lines)


def make_rules_table(plan: PlanSummary) -> Table:
    """Return the result of each rule, with the totals last."""
    rows = [
        (
            rule.label,
            rule.match,
            rule.action,
            format_numbers.format_count(rule.modules),
            format_numbers.format_parameters(rule.parameters),
            format_numbers.format_size(rule.bytes_before),
            format_numbers.format_size(rule.bytes_after),
            f"{rule.bits_per_weight:.2f}",
        )
        for rule in plan.rules
    ]
    totals = plan.totals
    rows.append((
        "total",
        "",
        f"{totals.modules_quantized:,} quantized, {totals.modules_kept:,} kept",
        format_numbers.format_count(totals.modules_quantized + totals.modules_kept),
        format_numbers.format_parameters(totals.parameters),
        format_numbers.format_size(totals.bytes_before),
        format_numbers.format_size(totals.bytes_after),
        f"{totals.bits_per_weight:.2f}",
    ))
    columns = (
        "rule",
        "matches",
        "action",
        ">modules",
        ">weights",
        ">before",
        ">after",
        ">bits",
    )
    note = "Bits per weight, with scales and zero points."
    return Table(title="Rules", columns=columns, rows=tuple(rows), note=note)


def make_texts_table(plan: PlanSummary) -> Table:
    """Return the parts of the calibration and fidelity text."""
    rows = tuple(
        (
            row.use,
            f"{row.set}: {row.part}" if row.part else row.set,
            format_labels(row.kinds),
            f"{row.share:.1%}",
            "all" if row.tokens is None else format_numbers.format_count(row.tokens),
            row.license,
            row.version,
        )
        for row in plan.texts
    )
    columns = ("use", "text", "kind", ">share", ">tokens", "license", "sha256 or revision")
    return Table(title="Texts", columns=columns, rows=rows)


def make_shards_table(plan: PlanSummary) -> Table:
    """Return the first output files and the last."""
    shards = plan.shards
    shown = shards if len(shards) <= SHARDS else (*shards[: SHARDS - 1], shards[-1])
    rows = tuple(
        (
            shard.file,
            format_numbers.format_count(shard.tensors),
            format_numbers.format_size(shard.bytes),
        )
        for shard in shown
    )
    note = (
        f"{len(shards)} files, {plan.totals.tensors:,} tensors." if len(shards) > len(shown) else ""
    )
    return Table(title="Output", columns=("file", ">tensors", ">size"), rows=rows, note=note)
