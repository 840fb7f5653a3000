"""Definitions of what tables, tiles and plots show: one sentence per heading. Pure.

Relative errors of weights, outputs and hidden states are one measure: the norm ratio.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quantkit.figures import list_figures

WEIGHTS = "||W - Q|| / ||W||: W is the matrix of the source, Q the stored one."
OUTPUTS = "||W X - Q X|| / ||W X||: the same ratio of the outputs, over the calibration tokens X."
HIDDEN_STATES = (
    "||artifact - source|| / ||source|| of the hidden states after the block, over the fidelity "
    "text; errors of the blocks before it are included."
)
NORM_RATIOS = f"Weights: {WEIGHTS} Outputs: {OUTPUTS}"

Meanings = tuple[tuple[str, str], ...]
"""Heading and sentence."""

HEADINGS = {
    "weights": WEIGHTS,
    "outputs": OUTPUTS,
    "SQNR dB": "20 log10(||W|| / ||W - Q||): the error of the weights in decibels, higher is "
    "better.",
    "error": HIDDEN_STATES,
    "same experts": "Share of the layer's top-k expert choices that are the source's, over the "
    "tokens of the fidelity text.",
    "outside": "Share of the text's activation energy at this input outside of the directions that "
    "calibration excited.",
    "rank": "Number of directions that calibration excited at this input (effective rank).",
    "under-calibrated": "Experts that saw fewer than calibration.min_expert_tokens tokens.",
    "source": "Score of the source on the same items.",
    "artifact": "Score of the artifact.",
    "Δ pp [95 % CI]": "Change of the score in percentage points, paired item by item.",
    "recovery [95 % CI]": "Score of the artifact as a share of the source's; the interval is that "
    "of the difference.",
    "lost/gained": "Items that became wrong, and items that became right.",
    "p": "McNemar's exact test on the changed items: the chance of so uneven a split if losing and "
    "gaining were equally likely.",
    "tokens per answer": "Mean tokens of an answer.",
    "B - A [points]": "Difference of the two shares in percentage points.",
}
"""Heading of a column, without its alignment mark -> sentence."""


def define_columns(columns: Iterable[str], others: Mapping[str, str] = {}) -> Meanings:
    """Return heading and sentence of the columns that have one; `others` replace sentences by the
    first word of a heading.
    """
    names = [name.removeprefix(">") for name in columns]
    sentences = {name: others.get(name.split(" ")[0], HEADINGS.get(name, "")) for name in names}
    return tuple((name, text) for name, text in sentences.items() if text)


def define_figures(keys: Iterable[str]) -> Meanings:
    """Return label and sentence of figures by key; "@" and what follows it is ignored."""
    figures = {row.key: row for row in list_figures()}
    bases = dict.fromkeys(key.partition("@")[0] for key in keys)
    return tuple((figures[key].label, figures[key].meaning) for key in bases if key in figures)
