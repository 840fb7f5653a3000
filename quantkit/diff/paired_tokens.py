"""Figures of the next-token distributions of two sides, over the same tokens. Pure.

Documents are the independent units (numerics.clustered); without them each token is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, isfinite

import numpy as np

from quantkit.artifact.fidelity_schema import DistributionResult, Figure
from quantkit.diff.comparability import Comparability
from quantkit.diff.diff_schema import DistributionDiff, KLDiff, Resolution
from quantkit.diff.sides import Side
from quantkit.diff.token_texts import TokenFigures
from quantkit.evaluate import statistics
from quantkit.figure_readers import ALL_TEXT
from quantkit.figures import FigureDefinition, list_figures
from quantkit.numerics import clustered
from quantkit.numerics.clustered import Array, Ratio

SIGNIFICANT = 0.05
"""p-value of the sign test below which documents are resolved."""


def pair_distributions(a: Side, b: Side, allowed: Comparability) -> tuple[DistributionDiff, ...]:
    """Return every figure of the table on every domain that both sides have.

    A figure with a `Pairing` gets its change over the same tokens, with its 95 % interval, if both
    sides kept their tokens.
    """
    if allowed.source or allowed.text:
        return ()
    second = {row.domain: row for row in b.fidelity.distribution}
    figures = [row for row in list_figures() if row.scope == "domain" and row.diff_label]
    rows: list[DistributionDiff] = []
    for first in a.fidelity.distribution:
        positions = list_positions(a, b, first, second.get(first.domain))
        groups = select_documents(a, b, positions)
        for figure in figures:
            values = [
                figure.read(a.fidelity, first.domain).value,
                figure.read(b.fidelity, first.domain).value if first.domain in second else None,
            ]
            if values == [None, None]:
                continue
            difference, ratio = _pair_figure(figure, a.tokens, b.tokens, positions, groups)
            rows.append(
                DistributionDiff(
                    domain=first.domain,
                    tokens=first.tokens,
                    figure=figure.key,
                    a=values[0],
                    b=values[1],
                    difference=difference,
                    ratio=ratio,
                    resolved=resolve_change(figure, ratio or difference, is_ratio=bool(ratio)),
                )
            )
    return tuple(rows)


def compare_kl(a: Side, b: Side, allowed: Comparability) -> tuple[KLDiff, ...]:
    """Return the KL of the same tokens on every domain; none next to a source, whose KL is 0.

    A domain is left out if a side has a KL that is not finite, or 0 for all of its tokens.
    """
    if allowed.source or allowed.text or a.tokens is None or b.tokens is None:
        return ()
    second = {row.domain: row for row in b.fidelity.distribution}
    rows = []
    for first in a.fidelity.distribution:
        positions = list_positions(a, b, first, second.get(first.domain))
        kl = [np.asarray(tokens.kl, dtype=np.float64)[positions] for tokens in (a.tokens, b.tokens)]
        if len(positions) and all(np.isfinite(side).all() and side.any() for side in kl):
            groups = select_documents(a, b, positions)
            rows.append(_make_kl_row(first.domain, clustered.compare_kl(kl[0], kl[1], groups)))
    return tuple(rows)


def _make_kl_row(domain: str, kl: clustered.KLComparison) -> KLDiff:
    return KLDiff(
        domain=domain,
        tokens=kl.tokens,
        typical=make_ratio(kl.typical),
        typical_a=kl.typical_kl[0],
        typical_b=kl.typical_kl[1],
        typical_resolved=_resolve(kl.typical.interval, 1.0),
        larger=Figure(value=kl.larger, ci=kl.larger_interval),
        larger_resolved=_resolve(kl.larger_interval, 0.5),
        documents=kl.documents,
        larger_documents=kl.larger_documents,
        sign_p=kl.sign_p,
        documents_resolved=_resolve_documents(kl),
        trimmed=make_ratio(kl.trimmed),
        trimmed_a=kl.trimmed_kl[0],
        trimmed_b=kl.trimmed_kl[1],
        trimmed_resolved=_resolve(kl.trimmed.interval, 1.0),
        left_out=kl.left_out,
        top_share_a=kl.top_share[0],
        top_share_b=kl.top_share[1],
    )


def _resolve_documents(kl: clustered.KLComparison) -> Resolution:
    """Return the direction in which most documents changed, if the sign test resolves it; "" for
    tokens without documents.
    """
    if kl.sign_p is None or kl.documents is None or kl.larger_documents is None:
        return ""
    if kl.sign_p >= SIGNIFICANT:
        return "not resolved"
    return "worse" if kl.larger_documents > kl.documents / 2 else "better"


def make_ratio(ratio: Ratio) -> Figure:
    """Return a ratio as a figure with its interval."""
    return Figure(value=ratio.value, ci=ratio.interval)


# ----------------------------------------------------------------------------------- which tokens


def is_pairable(a: TokenFigures, b: TokenFigures) -> bool:
    """Return whether both hold the same tokens of the same domains in the same order."""
    return list(a.domains) == list(b.domains)


def list_positions(
    a: Side, b: Side, row: DistributionResult, other: DistributionResult | None
) -> Array:
    """Return the positions of a domain's tokens [n]; none if the two rows count other numbers."""
    nothing = np.zeros(0, dtype=np.int64)
    if other is None or other.tokens != row.tokens or a.tokens is None or b.tokens is None:
        return nothing
    if not is_pairable(a.tokens, b.tokens):
        return nothing
    places = [n for n, name in enumerate(a.tokens.domains) if row.domain in (ALL_TEXT, name)]
    return np.array(places) if 2 <= len(places) == row.tokens else nothing


def select_documents(a: Side, b: Side, positions: Array) -> Array | None:
    """Return the documents of the tokens [n]; None if neither side recorded them."""
    for tokens in (a.tokens, b.tokens):
        if tokens is not None and tokens.documents is not None and len(positions):
            return np.asarray(tokens.documents)[positions]
    return None


# ------------------------------------------------------------------------------------- one figure


def _pair_figure(
    figure: FigureDefinition,
    a: TokenFigures | None,
    b: TokenFigures | None,
    positions: Array,
    documents: Array | None,
) -> tuple[Figure | None, Figure | None]:
    """Return the difference or the ratio of a figure over the same tokens; neither if it is not
    paired or a token is not finite.
    """
    pairing = figure.pairing
    if pairing is None or a is None or b is None or not len(positions):
        return None, None
    first, second = (
        np.asarray(pairing.column(tokens), dtype=np.float64)[positions] for tokens in (a, b)
    )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return None, None
    groups = clustered.number_documents(documents, len(first))
    if pairing.statistic == "share":
        low, high = clustered.compute_paired_share_interval(second - first, groups)
        return Figure(value=float((second - first).mean()), ci=(low, high)), None
    is_source = not first.any() or not second.any()
    if pairing.statistic == "mean ratio" and not is_source:
        return None, make_ratio(clustered.compute_mean_ratio(first, second, groups))
    if pairing.statistic == "quantile ratio":
        ratio = clustered.compute_quantile_ratio(first, second, pairing.quantile, documents)
        return None, make_ratio(ratio) if ratio else None
    error, interval = clustered.compute_mean_interval(second - first, groups)
    mean = float((second - first).mean())
    if pairing.statistic == "ratio":
        ends = tuple(None if end is None else exp(end) for end in interval)
        return None, Figure(value=exp(mean), ci=(ends[0], ends[1]))
    return Figure(value=mean, se=error, ci=interval), None


def pair_means(first: Sequence[float], second: Sequence[float]) -> Figure:
    """Return the paired mean difference of items; value None if one is not finite."""
    if not all(map(isfinite, (*first, *second))):
        return Figure(value=None)
    paired = statistics.paired_difference(first, second)
    return Figure(
        value=paired.mean,
        se=paired.standard_error,
        ci=(paired.interval.low, paired.interval.high),
    )


def resolve_change(
    figure: FigureDefinition | None, change: Figure | None, *, is_ratio: bool = False
) -> Resolution:
    """Return in which direction the interval excludes "no change"; "" without an interval."""
    if figure is None or change is None or change.ci is None:
        return ""
    return _resolve(change.ci, 1.0 if is_ratio else 0.0, higher=figure.direction == "higher")


def _resolve(interval: clustered.Interval, no_change: float, *, higher: bool = False) -> Resolution:
    """Return on which side of "no change" an interval lies; an end that is None has no limit."""
    low, high = interval
    if low is None and high is None:
        return ""
    if low is not None and low > no_change:
        return "better" if higher else "worse"
    if high is not None and high < no_change:
        return "worse" if higher else "better"
    return "not resolved"
