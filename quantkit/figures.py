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
from math import exp, sqrt
from sys import float_info
from typing import Any, Literal

from quantkit.figure_readers import (
    Reader,
    Reading,
    read_artifact,
    read_block_error,
    read_coverage,
    read_distribution,
    read_fallbacks,
    read_likelihood,
    read_lost_items,
    read_mean_over_kinds,
    read_module_error,
    read_noise,
    read_output_error,
    read_overlapping_items,
    read_router_agreement,
    read_shift,
    read_uncalibrated,
    read_worst_kind,
    read_yardstick,
    read_yardstick_kl,
)

Style = Literal["nats", "ratio", "factor", "percent", "signed percent", "count", "bits", "bytes"]
"""How a value is written; see `report.format_numbers.STYLES`."""


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """How two artifacts are compared token by token.

    statistic: "mean" is the mean of B - A; "ratio" is exp of it; "share" is the difference of two
    proportions (Bonett and Price 2012); "mean ratio" is the ratio of the means; "quantile ratio"
    that of the quantiles at `quantile`. Ratios of a source, which is 0, are differences of means.
    column: the values of every token, from `diff.sides.TokenFigures`.
    """

    statistic: Literal["mean", "ratio", "share", "mean ratio", "quantile ratio"]
    column: Callable[[Any], Sequence[float]]
    quantile: float = 0.5

    @property
    def is_ratio(self) -> bool:
        """Whether the change is a factor, B / A."""
        return "ratio" in self.statistic


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


# ---------------------------------------------------------------------------------------- the table


FIGURES: tuple[FigureDefinition, ...] = (
    FigureDefinition(
        key="size", label="size", style="bytes", direction="lower", unit="bytes", scope="artifact",
        is_streamed=False, reader=read_artifact("bytes_artifact"),
        meaning="Bytes of all tensors.",
        tile="Size", run_column="size", run_heading="size",
    ),
    FigureDefinition(
        key="bits_overall", label="bits per weight, overall", style="bits", direction="lower",
        unit="bits", scope="artifact", is_streamed=False, reader=read_artifact("bits_overall"),
        meaning="Bits of all tensors per parameter of the model.", run_column="bits",
        run_heading="bits", tile="Bits per weight", tile_note="overall; {bits} of quantized",
    ),
    FigureDefinition(
        key="bits_per_weight", label="bits per weight", style="bits", direction="lower",
        unit="bits", scope="artifact", is_streamed=False, reader=read_artifact("bits_per_weight"),
        meaning="Bits per quantized weight, scales and zero points included.",
        run_column="bits_quantized", run_heading="quantized",
    ),
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
        pairing=Pairing(statistic="mean ratio", column=lambda tokens: tokens.kl),
    ),
    FigureDefinition(
        key="yardstick", label="KL mean / that of RTN", style="factor", direction="lower",
        reader=read_yardstick,
        meaning="Mean KL over the yardstick's: the same modules, bits and groups rounded to "
                "nearest; 1x gains nothing.",
        tile="Mean KL of RTN's", tile_note="1x: rounding to nearest",
    ),
    FigureDefinition(
        key="kl_yardstick", label="KL mean, RTN [nats/token]", style="nats", direction="lower",
        unit="nats/token", reader=read_yardstick_kl,
        meaning="Mean KL of the yardstick, over the same tokens.",
    ),
    FigureDefinition(
        key="kl_noise", label="KL mean, noise floor [nats/token]", style="nats",
        direction="lower", unit="nats/token", reader=read_noise,
        meaning="Mean KL of the source with its final norm and head in bfloat16 against itself in "
                "float32: what an engine's arithmetic moves, at least.",
    ),
    FigureDefinition(
        key="kl_median", label="KL median", style="nats", direction="lower", unit="nats/token",
        at_source=0.0,
        meaning="Median of the tokens' KL.",
        diff_label="KL median",
        pairing=Pairing(statistic="quantile ratio", column=lambda tokens: tokens.kl),
    ),
    FigureDefinition(
        key="kl_p99", label="KL 99 %", style="nats", direction="lower", unit="nats/token",
        at_source=0.0,
        meaning="99th percentile of the tokens' KL.",
        mark="99 %", diff_label="KL 99 %",
        pairing=Pairing(
            statistic="quantile ratio", column=lambda tokens: tokens.kl, quantile=0.99
        ),
    ),
    FigureDefinition(
        key="kl_p999", label="KL 99.9 %", style="nats", direction="lower", unit="nats/token",
        at_source=0.0,
        meaning="99.9th percentile of the tokens' KL.",
        mark="99.9 %", diff_label="KL 99.9 %",
        pairing=Pairing(
            statistic="quantile ratio", column=lambda tokens: tokens.kl, quantile=0.999
        ),
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
        meaning="Root mean square change of the true token's probability, artifact - source.",
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
        meaning="||artifact - source|| / ||source|| of the hidden states after the worst block, "
                "over the fidelity text.",
    ),
    FigureDefinition(
        key="module_error", label="module error", style="percent", direction="lower",
        scope="artifact", is_streamed=False, reader=read_module_error,
        meaning="||W - Q|| / ||W|| of the weights of the worst quantized matrix W.",
    ),
    FigureDefinition(
        key="output_error", label="output error", style="percent", direction="lower",
        scope="artifact", is_streamed=False, reader=read_output_error,
        meaning="||W X - Q X|| / ||W X|| of the outputs of the worst quantized matrix W, over the "
                "calibration tokens X.",
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
        key="likelihood", label="gold solutions", style="nats", direction="higher",
        unit="nats/token", scope="task", reader=read_likelihood,
        meaning="Change of the log-likelihood per token of gold solutions, artifact - "
                "source; the lowest task.",
    ),
)  # fmt: skip
"""Every figure, in the order of the tables."""

ENERGY_GATE, NORM_GATE = "module_output_error", "output_error"
"""Former key of the outputs' error, an energy ratio, and the key of its root, the norm ratio."""


def list_figures() -> tuple[FigureDefinition, ...]:
    """Return every row, in the order of the tables."""
    return FIGURES


def list_headline_figures() -> tuple[FigureDefinition, ...]:
    """Return every row, those of the whole artifact first: the order of tiles and of `runs`."""
    return tuple(sorted(FIGURES, key=lambda row: row.scope != "artifact"))


def list_stored_keys() -> tuple[str, ...]:
    """Return the keys that fidelity.json stores for every domain."""
    return tuple(row.key for row in FIGURES if row.scope == "domain" and row.reader is None)


def convert_energy(value: object) -> object:
    """Return the norm ratio of an energy ratio; a value that is no energy ratio unchanged.

    JSON and YAML may hold integers that are too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return sqrt(value) if 0 <= value <= float_info.max else value


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
