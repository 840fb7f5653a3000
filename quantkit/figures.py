"""The table of figures: one row per figure of a fidelity report.

Recipes accept the keys as gates; the report's tables, page and model card, `quantkit diff` and
`quantkit runs` follow its rows. Pure data and functions: a report is any value with the
attributes of `artifact.fidelity_schema.Fidelity`. Adding a figure is adding a row to `FIGURES`;
quantkit/report/README.md describes how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, hypot
from statistics import fmean
from typing import Any, Literal

NOT_MEASURED = "not measured"
NOT_FINITE = "not finite"
ALL_TEXT = "all"
"""The domain that pools every token of the fidelity text."""
LOW_COVERAGE = 0.85
"""Coverage below which a report names the kind of text and the remedy (numerics/README.md)."""

Style = Literal["nats", "ratio", "percent", "signed percent", "count", "bits", "bytes"]
"""How a value is written; see `report.format_numbers.STYLES`."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A figure as read from a report.

    value None: `reason` says why ("not measured ..." or "not finite"). With a value, `reason` says
    which part of the artifact or of the text it covers.
    """

    value: float | None
    reason: str = ""
    se: float | None = None
    ci: tuple[float | None, float | None] | None = None

    @property
    def is_measured(self) -> bool:
        """Whether the figure was measured; the value may still be not finite."""
        return self.value is not None or self.reason == NOT_FINITE


Reader = Callable[[Any, str], Reading]
"""(report, domain or task; "" for all) -> the figure."""


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """How two artifacts are compared token by token.

    statistic: "mean" is the mean of B - A; "ratio" is exp of it; "share" is the difference of two
    proportions (Bonett and Price 2012).
    column: the values of every token, from `diff.sides.TokenFigures`.
    """

    statistic: Literal["mean", "ratio", "share"]
    column: Callable[[Any], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class FigureDefinition:
    """One row of the table."""

    key: str  # in fidelity.json and in gates
    label: str  # in tables
    meaning: str  # one sentence
    style: Style
    direction: Literal["lower", "higher"]  # which is better
    unit: str = ""
    scope: Literal["artifact", "domain", "task"] = "domain"  # "@" selects a domain or a task
    reader: Reader | None = None  # None: fidelity.json stores the figure per domain
    is_streamed: bool = True  # measured by the pass over the fidelity text
    mark: str = ""  # its name in the histogram of KL
    tile: str = ""  # heading on the page; "" for none
    tile_note: str = ""  # under the value; {tokens} is the number of scored tokens
    run_column: str = ""  # key of `quantkit runs --json` and --sort; "" for none
    run_heading: str = ""
    diff_label: str = ""  # in `quantkit diff`; "" for none
    diff_tile: str = ""
    pairing: Pairing | None = None
    at_source: float | str | None = None  # of the unquantized source: a value, or another key

    def read(self, report: Any, part: str = "") -> Reading:
        """Return the figure of a report; `part` is a domain or a task, "" for all of them."""
        reader = self.reader or partial(read_distribution, self.key)
        return reader(report, part)

    @property
    def places(self) -> str:
        """Parts of quantkit that show the figure, for the documentation."""
        places = {
            "gates": True,
            "tables": self.scope == "domain",
            "page": bool(self.tile),
            "diff": bool(self.diff_label),
            "runs": bool(self.run_column),
        }
        return ", ".join(name for name, shown in places.items() if shown)


# ----------------------------------------------------------------------------------------- readers


def read_distribution(key: str, report: Any, domain: str) -> Reading:
    """Read a stored figure of the next-token distributions of one domain, "" for all text."""
    row = next((row for row in report.distribution if row.domain == (domain or ALL_TEXT)), None)
    if row is None and report.distribution:
        domains = ", ".join(row.domain for row in report.distribution)
        return Reading(value=None, reason=f"{NOT_MEASURED}: the text has {domains}")
    figure = row.figures.get(key) if row else None
    if figure is None:
        return Reading(value=None, reason=NOT_MEASURED)
    if figure.value is None:
        return Reading(value=None, reason=NOT_FINITE)
    return Reading(value=figure.value, se=figure.se, ci=figure.ci)


def read_extreme(values: Sequence[float | None], *, largest: bool) -> Reading:
    """Read the largest or smallest of values that were all measured; None is a value that is
    not finite."""
    finite = [value for value in values if value is not None]
    if not values:
        return Reading(value=None, reason=NOT_MEASURED)
    if len(finite) < len(values):
        return Reading(value=None, reason=NOT_FINITE)
    return Reading(value=max(finite) if largest else min(finite))


def list_kinds(report: Any) -> dict[str, Reading]:
    """Return the mean KL of every kind of text that the report measured, without the pooled row."""
    labels = [row.domain for row in report.distribution if row.domain != ALL_TEXT]
    return {label: read_distribution("kl_mean", report, label) for label in labels}


def list_seen_kinds(report: Any) -> frozenset[str] | None:
    """Return the kinds of text that the artifact was calibrated on; None if the report has none.

    An artifact without calibration has seen no kind, and a report of an earlier version does not
    say. A pooled kind is seen if all its members are.
    """
    if report.calibration is None or not report.calibration.kinds:
        return None
    seen = frozenset(report.calibration.kinds)
    pooled = report.measured_on.pooled if report.measured_on else {}
    return seen | {label for label, members in pooled.items() if seen.issuperset(members)}


def read_worst_kind(report: Any, _part: str) -> Reading:
    """Read the largest mean KL of a kind of text; `reason` names the kind."""
    kinds = list_kinds(report)
    reading = read_extreme([kind.value for kind in kinds.values()], largest=True)
    if reading.value is None:
        return reading
    label = max(kinds, key=lambda label: kinds[label].value or 0.0)
    return Reading(value=reading.value, se=kinds[label].se, reason=label)


def read_mean_over_kinds(report: Any, _part: str) -> Reading:
    """Read the mean of the kinds' mean KL: kinds count equally, whatever tokens they have."""
    return average_readings(list(list_kinds(report).values()))


def average_readings(readings: Sequence[Reading]) -> Reading:
    """Return the mean of independent readings, with its standard error if each has one."""
    values = [reading.value for reading in readings if reading.value is not None]
    if len(values) < len(readings):
        return Reading(value=None, reason=NOT_FINITE)
    if not values:
        return Reading(value=None, reason=NOT_MEASURED)
    errors = [reading.se for reading in readings if reading.se is not None]
    known = len(errors) == len(readings)
    return Reading(value=fmean(values), se=hypot(*errors) / len(errors) if known else None)


def read_shift(report: Any, _part: str) -> Reading:
    """Read the mean KL of unseen kinds over that of seen kinds; 1 is calibration that carries
    over.
    """
    kinds, seen = list_kinds(report), list_seen_kinds(report)
    if not kinds:
        return Reading(value=None, reason=NOT_MEASURED)
    if seen is None:
        return Reading(value=None, reason=f"{NOT_MEASURED}: the kinds calibrated on are unknown")
    groups = {
        "seen": [reading for label, reading in kinds.items() if label in seen],
        "unseen": [reading for label, reading in kinds.items() if label not in seen],
    }
    absent = [name for name, readings in groups.items() if not readings]
    if absent:
        return Reading(value=None, reason=f"{NOT_MEASURED}: the text has no {absent[0]} kind")
    below, above = average_readings(groups["seen"]), average_readings(groups["unseen"])
    if above.value is None or not below.value:
        return Reading(value=None, reason=NOT_FINITE)
    return Reading(value=above.value / below.value)


def read_likelihood(report: Any, task: str) -> Reading:
    """Read the change of a task's gold solutions, or the lowest of all tasks."""
    rows = [row for row in report.likelihood if task in ("", row.task)]
    missing = [row for row in rows if row.difference is None]
    if missing or not rows:
        reason = f"{NOT_MEASURED}: {missing[0].reason}" if missing else NOT_MEASURED
        return Reading(value=None, reason=reason)
    return read_extreme([row.difference.value for row in rows], largest=False)


def read_lost_items(report: Any, _part: str) -> Reading:
    """Read the number of items, over all tasks, that the source has right and the artifact
    wrong."""
    missing = [row.task for row in report.benchmarks if row.lost is None]
    if missing or not report.benchmarks:
        names = f": {', '.join(missing)} was not run" if missing else ""
        return Reading(value=None, reason=NOT_MEASURED + names)
    return Reading(value=float(sum(row.lost for row in report.benchmarks)))


def read_overlapping_items(report: Any, _part: str) -> Reading:
    """Read the number of benchmark prompts, over all tasks, that appear in the calibration text."""
    rows = report.calibration.overlaps if report.calibration else ()
    checked = [row for row in rows if row.items]
    if not checked:
        return Reading(value=None, reason=NOT_MEASURED)
    return Reading(value=float(sum(row.overlapping for row in checked)))


def read_module_output_error(report: Any, _part: str) -> Reading:
    """Read the largest relative output error; an expert that no token reached has none."""
    errors = [row.output_relative_error for row in report.modules if row.method is not None]
    known = [error for error in errors if error is not None]
    if not known:
        return Reading(value=None, reason=NOT_MEASURED)
    missing = len(errors) - len(known)
    reason = f"{missing:,} of {len(errors):,} modules not measured" if missing else ""
    return Reading(value=max(known), reason=reason)


def read_module_error(report: Any, _part: str) -> Reading:
    """Read the largest relative weight error of a quantized matrix."""
    errors = [row.relative_error for row in report.modules if row.method is not None]
    return read_extreme(errors, largest=True)


def read_block_error(report: Any, _part: str) -> Reading:
    """Read the largest relative error of the hidden states after a block."""
    return read_extreme([row.relative_error for row in report.blocks], largest=True)


def read_router_agreement(report: Any, _part: str) -> Reading:
    """Read the lowest share of expert choices of a layer that agree with the source's."""
    return read_extreme([row.agreement for row in report.routers], largest=False)


def read_uncalibrated(report: Any, _part: str) -> Reading:
    """Read the number of routed experts that saw too few calibration tokens."""
    if report.experts is None:
        return Reading(value=None, reason=NOT_MEASURED)
    return Reading(value=float(len(report.experts.list_uncalibrated())))


def read_coverage(report: Any, _part: str) -> Reading:
    """Read 1 - the largest unspanned share of a kind of text; `reason` names kind and input."""
    worst = report.find_worst_inputs()
    reading = read_extreme([share for share, _ in worst.values()], largest=True)
    if reading.value is None:
        return reading
    kind = max(worst, key=lambda kind: worst[kind][0])
    return Reading(value=1 - reading.value, reason=f"{kind} at {worst[kind][1].input}")


def read_fallbacks(report: Any, _part: str) -> Reading:
    """Read the number of modules that took any fallback."""
    return Reading(value=float(len({name for row in report.fallbacks for name in row.modules})))


def read_bits_per_weight(report: Any, _part: str) -> Reading:
    """Read the bits per quantized weight, scales and zero points included."""
    return Reading(value=report.artifact.bits_per_weight)


def read_size(report: Any, _part: str) -> Reading:
    """Read the bytes of the artifact's tensors."""
    return Reading(value=float(report.artifact.bytes_artifact))


# ---------------------------------------------------------------------------------------- the table


FIGURES: tuple[FigureDefinition, ...] = (
    FigureDefinition(
        key="kl_worst_kind", label="KL mean, worst kind [nats/token]", style="nats",
        direction="lower", unit="nats/token", scope="artifact", reader=read_worst_kind,
        meaning="Mean KL of the kind of text that loses most.",
        tile="Mean KL, worst kind", tile_note="nats per token", run_column="kl_worst",
        run_heading="KL worst",
    ),
    FigureDefinition(
        key="kl_mean_kinds", label="KL mean over kinds [nats/token]", style="nats",
        direction="lower", unit="nats/token", scope="artifact", reader=read_mean_over_kinds,
        meaning="Mean over the kinds of text of their mean KL: kinds count equally, not tokens.",
        tile="Mean KL over kinds", tile_note="nats per token",
    ),
    FigureDefinition(
        key="shift", label="KL unseen / KL seen", style="ratio", direction="lower",
        scope="artifact", reader=read_shift,
        meaning="Mean KL of the kinds not calibrated on over that of the kinds calibrated on.",
        tile="Unseen / seen KL", tile_note="kinds of text",
    ),
    FigureDefinition(
        key="kl_mean", label="KL mean [nats/token]", style="nats", direction="lower",
        unit="nats/token", at_source=0.0,
        meaning="Mean over the tokens of KL(source || artifact), over the full vocabulary.",
        mark="mean", tile="Mean KL", tile_note="nats per token", run_column="kl", run_heading="KL",
        diff_label="KL mean [nats/token]", diff_tile="Mean KL",
        pairing=Pairing(statistic="mean", column=lambda tokens: tokens.kl),
    ),
    FigureDefinition(
        key="kl_median", label="KL median", style="nats", direction="lower", unit="nats/token",
        at_source=0.0,
        meaning="Median of the tokens' KL.",
        diff_label="KL median",
    ),
    FigureDefinition(
        key="kl_p99", label="KL 99 %", style="nats", direction="lower", unit="nats/token",
        at_source=0.0,
        meaning="99th percentile of the tokens' KL.",
        mark="99 %", diff_label="KL 99 %",
    ),
    FigureDefinition(
        key="kl_p999", label="KL 99.9 %", style="nats", direction="lower", unit="nats/token",
        at_source=0.0,
        meaning="99.9th percentile of the tokens' KL.",
        mark="99.9 %", diff_label="KL 99.9 %",
    ),
    FigureDefinition(
        key="kl_max", label="KL max", style="nats", direction="lower", unit="nats/token",
        at_source=0.0,
        meaning="Largest KL of a token.",
        diff_label="KL max",
    ),
    FigureDefinition(
        key="ppl_source", label="perplexity, source", style="ratio", direction="lower",
        meaning="exp of the source's mean negative log-likelihood per token.",
    ),
    FigureDefinition(
        key="ppl_artifact", label="perplexity, artifact", style="ratio", direction="lower",
        at_source="ppl_source",
        meaning="exp of the artifact's mean negative log-likelihood per token.",
        diff_label="perplexity", diff_tile="Perplexity",
        pairing=Pairing(statistic="ratio", column=lambda tokens: tokens.nll),
    ),
    FigureDefinition(
        key="ppl_ratio", label="perplexity ratio", style="ratio", direction="lower", at_source=1.0,
        meaning="Perplexity of the artifact divided by that of the source; its error is paired.",
        tile="Perplexity ratio", tile_note="artifact / source", run_column="ppl",
        run_heading="ppl ratio",
    ),
    FigureDefinition(
        key="top1", label="same top token", style="percent", direction="higher", at_source=1.0,
        meaning="Share of the tokens whose most probable next token is the source's.",
        tile="Same top token", tile_note="of {tokens} tokens", run_column="top1",
        run_heading="top-1", diff_label="same top token", diff_tile="Same top token",
        pairing=Pairing(statistic="share", column=lambda tokens: tokens.same_top),
    ),
    FigureDefinition(
        key="mean_delta_p", label="mean Δp", style="signed percent", direction="higher",
        at_source=0.0,
        meaning="Mean change of the true token's probability, artifact - source.",
        diff_label="mean Δp",
        pairing=Pairing(statistic="mean", column=lambda tokens: [exp(-nll) for nll in tokens.nll]),
    ),
    FigureDefinition(
        key="rms_delta_p", label="RMS Δp", style="percent", direction="lower", at_source=0.0,
        meaning="Root mean square of that change.",
        diff_label="RMS Δp",
    ),
    FigureDefinition(
        key="router_agreement", label="router agreement", style="percent", direction="higher",
        scope="artifact", reader=read_router_agreement,
        meaning="Share of top-k expert choices that agree with the source's, in the lowest layer.",
    ),
    FigureDefinition(
        key="block_error", label="block error", style="percent", direction="lower",
        scope="artifact", reader=read_block_error,
        meaning="||artifact - source|| / ||source|| of the hidden states, after the worst block.",
    ),
    FigureDefinition(
        key="module_error", label="module error", style="percent", direction="lower",
        scope="artifact", is_streamed=False, reader=read_module_error,
        meaning="||W - Q|| / ||W|| of the worst quantized matrix.",
    ),
    FigureDefinition(
        key="module_output_error", label="module output error", style="percent", direction="lower",
        scope="artifact", is_streamed=False, reader=read_module_output_error,
        meaning="The same of its outputs W x over the calibration tokens, worst matrix.",
    ),
    FigureDefinition(
        key="experts_uncalibrated", label="under-calibrated experts", style="count",
        direction="lower", unit="experts", scope="artifact", is_streamed=False,
        reader=read_uncalibrated,
        meaning="Routed experts that saw fewer than calibration.min_expert_tokens tokens.",
    ),
    FigureDefinition(
        key="coverage", label="coverage", style="percent", direction="higher", scope="artifact",
        reader=read_coverage,
        meaning="Share of activation energy that calibration spans, mean over tokens; the lowest "
                "kind of text at the lowest input.",
        tile="Coverage", tile_note="of activations by calibration", run_column="coverage",
        run_heading="coverage",
    ),
    FigureDefinition(
        key="fallbacks", label="fallbacks", style="count", direction="lower", unit="modules",
        scope="artifact", is_streamed=False, reader=read_fallbacks,
        meaning="Modules where a named fallback replaced the method.",
    ),
    FigureDefinition(
        key="lost_items", label="lost items", style="count", direction="lower", unit="items",
        scope="artifact", is_streamed=False, reader=read_lost_items,
        meaning="Benchmark items, over all tasks, right in the source and wrong in the artifact.",
    ),
    FigureDefinition(
        key="overlapping_items", label="prompts in the calibration text", style="count",
        direction="lower", unit="items", scope="artifact", is_streamed=False,
        reader=read_overlapping_items,
        meaning="Benchmark prompts, over all tasks, that appear in the calibration text.",
    ),
    FigureDefinition(
        key="size", label="size", style="bytes", direction="lower", unit="bytes", scope="artifact",
        is_streamed=False, reader=read_size,
        meaning="Bytes of all tensors.",
        tile="Size", run_column="size", run_heading="size",
    ),
    FigureDefinition(
        key="bits_per_weight", label="bits per weight", style="bits", direction="lower",
        unit="bits", scope="artifact", is_streamed=False, reader=read_bits_per_weight,
        meaning="Bits per quantized weight, scales and zero points included.",
        tile="Bits per weight", tile_note="quantized weights only", run_column="bits",
        run_heading="bits",
    ),
    FigureDefinition(
        key="likelihood", label="gold solutions", style="nats", direction="higher",
        unit="nats/token", scope="task", reader=read_likelihood,
        meaning="Change of the log-likelihood per token of gold solutions, artifact - "
                "source; the lowest task.",
    ),
)  # fmt: skip
"""Every figure, in the order of the tables."""


def list_figures() -> tuple[FigureDefinition, ...]:
    """Return every row, in the order of the tables."""
    return FIGURES


def list_headline_figures() -> tuple[FigureDefinition, ...]:
    """Return every row, those of the whole artifact first: the order of tiles and of `runs`."""
    return tuple(sorted(FIGURES, key=lambda row: row.scope != "artifact"))


def list_stored_keys() -> tuple[str, ...]:
    """Return the keys that fidelity.json stores for every domain."""
    return tuple(row.key for row in FIGURES if row.scope == "domain" and row.reader is None)


def list_keys() -> tuple[str, ...]:
    """Return every key that a gate may bound with min or max."""
    return tuple(row.key for row in FIGURES)


def find_figure(key: str) -> FigureDefinition | None:
    """Return the row of a key, without "@domain"; None for an unknown key."""
    return next((row for row in FIGURES if row.key == key), None)


def is_per_domain(key: str) -> bool:
    """Return whether the key takes "@domain"."""
    row = find_figure(key)
    return row is not None and row.scope == "domain"


def is_per_task(key: str) -> bool:
    """Return whether the key takes "@task"."""
    row = find_figure(key)
    return row is not None and row.scope == "task"


def is_streamed(key: str) -> bool:
    """Return whether the figure is measured by the pass over the fidelity text."""
    row = find_figure(key)
    return row is not None and row.is_streamed


def is_size(key: str) -> bool:
    """Return whether bounds of the figure may be written as sizes ("400GB")."""
    row = find_figure(key)
    return row is not None and row.style == "bytes"
