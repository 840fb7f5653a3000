"""Tables of the next-token distributions of two sides over the same tokens. Pure."""

from __future__ import annotations

from quantkit.artifact.fidelity_schema import Figure
from quantkit.artifact.token_schema import MOST_TOKENS
from quantkit.diff.diff_schema import Diff, DistributionDiff, KLDiff
from quantkit.figure_readers import ALL_TEXT
from quantkit.figures import FigureDefinition, list_figures
from quantkit.report import format_numbers, token_tables
from quantkit.report.definitions import Meanings
from quantkit.report.table import Table

COLUMNS = ("figure", ">A", ">B", ">change [95 % CI]", "B is")
TYPICAL, LARGER, DOCUMENTS = "KL, typical token", "tokens with larger KL", "documents, larger KL"
SENTENCES = {
    TYPICAL: "Geometric mean over the tokens; its change is the geometric mean of B / A, which no "
    "single token decides.",
    LARGER: "Share of the tokens whose KL is larger in B; ties count half, and 50 % is no change.",
    DOCUMENTS: "Documents whose tokens have a typical B / A above 1, with the sign test over "
    "documents.",
}


def make_distribution_table(diff: Diff) -> Table:
    """Return all figures over all text: first those that heavy tails do not break."""
    figures = {row.key: row for row in list_figures()}
    rows, meanings = list[tuple[str, ...]](), dict[str, str]()
    kl = next((row for row in diff.kl if row.domain == ALL_TEXT), None)
    if kl:
        rows += _list_kl_rows(kl)
        heading = rows[0][0]  # TYPICAL, perhaps with a power of ten
        meanings |= {heading: SENTENCES[TYPICAL]}
        meanings |= {name: SENTENCES[name] for name in (LARGER, DOCUMENTS)}
    for row in diff.distribution:
        figure = figures[row.figure]
        if row.domain != ALL_TEXT:
            continue
        label, *cells = _format_pair(figure, row)
        change = _format_change(figure, row)
        rows.append((label, *cells, change, row.resolved))
        meanings[label] = figure.meaning
        if kl and row.figure == "kl_mean":
            rows.append(_make_trimmed_row(kl))
            meanings[rows[-1][0]] = (
                "Mean without the tokens with the largest KL in either: one in a thousand, at "
                "least one."
            )
    return Table(
        title="Next-token distributions",
        columns=COLUMNS,
        rows=tuple(rows),
        note=_describe_method(diff) if rows else "",
        meanings=tuple(meanings.items()),
    )


def describe_left_out(count: int) -> str:
    """Return the name of the mean without the largest tokens."""
    return f"KL mean without {count:,} largest" if count > 1 else "KL mean without the largest"


def _list_kl_rows(kl: KLDiff) -> list[tuple[str, ...]]:
    power, a, b = format_numbers.format_nats_pair(kl.typical_a, kl.typical_b)
    missing = format_numbers.MISSING
    rows: list[tuple[str, ...]] = [
        (
            format_numbers.add_power(TYPICAL, power),
            a,
            b,
            format_numbers.format_factors(kl.typical),
            kl.typical_resolved,
        ),
        (
            LARGER,
            missing,
            missing,
            format_numbers.format_figure(kl.larger, "percent"),
            kl.larger_resolved,
        ),
    ]
    if kl.documents and kl.larger_documents is not None:
        p = format_numbers.format_probability(kl.sign_p)
        sign = "" if p.startswith("<") else "= "
        count = f"{kl.larger_documents:,} of {kl.documents:,}, p {sign}{p}"
        rows.append((DOCUMENTS, missing, missing, count, kl.documents_resolved))
    return rows


def _make_trimmed_row(kl: KLDiff) -> tuple[str, ...]:
    power, a, b = format_numbers.format_nats_pair(kl.trimmed_a, kl.trimmed_b)
    label = format_numbers.add_power(describe_left_out(kl.left_out), power)
    return (label, a, b, format_numbers.format_factors(kl.trimmed), kl.trimmed_resolved)


def make_kind_table(diff: Diff) -> Table:
    """Return a row per kind of text: typical and mean KL, tokens that agree on the top token."""
    by_domain = {
        (row.domain, row.figure): row for row in diff.distribution if row.domain != ALL_TEXT
    }
    kl = {row.domain: row for row in diff.kl}
    figures = {row.key: row for row in list_figures()}
    rows, missing = [], format_numbers.MISSING
    for domain in dict.fromkeys(domain for domain, _ in by_domain):
        own, mean = kl.get(domain), by_domain.get((domain, "kl_mean"))
        top = by_domain.get((domain, "top1"))
        first = next(row for (name, _), row in by_domain.items() if name == domain)
        rows.append((
            domain,
            format_numbers.format_count(first.tokens),
            format_numbers.format_factors(own.typical) if own else missing,
            format_numbers.format_percent(own.larger.value, 1) if own else missing,
            _format_change(figures["kl_mean"], mean) if mean else missing,
            _format_change(figures["top1"], top) if top else missing,
            own.typical_resolved if own else mean.resolved if mean else "",
        ))
    columns = (
        "text",
        ">tokens",
        ">typical KL [95 % CI]",
        ">larger on",
        ">mean KL [95 % CI]",
        ">same top [95 % CI]",
        "B is",
    )
    meanings: Meanings = (
        ("typical KL [95 % CI]", SENTENCES[TYPICAL]),
        ("larger on", SENTENCES[LARGER]),
        ("mean KL [95 % CI]", "Ratio of the means, B / A."),
        ("same top [95 % CI]", "Change of the share of tokens whose most probable next token is "
         "the source's, in percentage points."),
    )  # fmt: skip
    note = '"B is" follows the typical KL.'
    return Table(
        title="By kind of text",
        columns=columns,
        rows=tuple(rows),
        note=note if rows and diff.kl else "",
        meanings=meanings,
    )


def make_worse_token_table(diff: Diff, limit: int = MOST_TOKENS) -> Table:
    """Return the tokens whose KL rose most from A to B, with the best guess of each model."""
    rows = tuple(
        (
            token_tables.quote_context(row.context, is_cut=row.is_cut),
            f"{token_tables.quote_token(row.token)} {token_tables.format_share(row.p_a)} to "
            f"{token_tables.format_share(row.p_b)}",
            format_numbers.format_digits(row.kl_a),
            format_numbers.format_digits(row.kl_b),
            token_tables.format_choice(row.source) or format_numbers.MISSING,
            token_tables.format_choice(row.b) or format_numbers.MISSING,
            row.kind,
        )
        for row in diff.worse_tokens[:limit]
    )
    total = len(diff.worse_tokens)
    rest = f"The worst {len(rows)} of {total}; all in --json. " if len(rows) < total else ""
    return Table(
        title="Tokens that got worse most",
        columns=("after", "true token", ">KL, A", ">KL, B", "source says", "B says", "text"),
        rows=rows,
        note=rest + token_tables.ALIKE if rows else "",
        meanings=(
            ("after", token_tables.AFTER),
            ("true token", "The token that the text has there, with its probability in A and B."),
            ("KL, A", token_tables.KL),
            ("KL, B", token_tables.KL),
            ("source says", token_tables.TOP),
            ("B says", token_tables.TOP),
        ),
    )


def _format_pair(figure: FigureDefinition, row: DistributionDiff) -> tuple[str, str, str]:
    """Return the label and both values in one notation."""
    if figure.style != "nats" or row.a is None or row.b is None:
        a, b = (format_numbers.format_value(figure, value) for value in (row.a, row.b))
        return figure.diff_label, a, b
    power, a, b = format_numbers.format_nats_pair(row.a, row.b)
    return format_numbers.add_power(figure.diff_label, power), a, b


def _is_ratio(figure: FigureDefinition) -> bool:
    return figure.pairing is not None and figure.pairing.is_ratio


def _format_change(figure: FigureDefinition, row: DistributionDiff) -> str:
    """Return "8.6x [3.1, 23.7]" or "-0.31 pp [-0.52, -0.10]"; no interval without paired tokens."""
    if row.ratio:
        return format_numbers.format_factors(row.ratio)
    is_share = figure.style in ("percent", "signed percent")
    show = format_numbers.STYLES[figure.style].difference
    unit = " pp" if is_share else ""
    difference: Figure | None = row.difference
    if difference is None or difference.value is None:
        if row.a is None or row.b is None:
            return format_numbers.MISSING
        if row.a and row.b and (figure.style == "nats" or _is_ratio(figure)):
            return format_numbers.format_factor(row.b / row.a)
        return show(row.b - row.a) + unit
    low, high = difference.ci or (None, None)
    if low is None or high is None:
        return show(difference.value) + unit
    return f"{show(difference.value)}{unit} [{show(low)}, {show(high)}]"


def _describe_method(diff: Diff) -> str:
    """Return a note on the compared tokens and the assumptions of the intervals."""
    paired = [row for row in diff.distribution if row.ratio or row.difference]
    if not paired:
        return "The tokens of both sides are not available, so the changes have no interval."
    n = max(row.tokens for row in paired)
    documents = next((row.documents for row in diff.kl if row.domain == ALL_TEXT), None)
    units = (
        f"in {documents:,} documents, which are the independent units"
        if documents
        else "which count as independent: the samples do not record their documents"
    )
    n_intervals = sum(row.resolved != "" for row in diff.distribution)
    chance = (
        f" {n_intervals} intervals: about one in twenty misses the true value by chance."
        if n_intervals > 1
        else ""
    )
    return f"Changes are over the same {n:,} tokens {units}; x is B / A, pp is B - A.{chance}"
