"""Tables of single tokens with their context. Pure.

Texts come from strangers: control characters are escaped here, and each view escapes the rest.
"""

from __future__ import annotations

import json

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.token_schema import Choices
from quantkit.figure_readers import ALL_TEXT
from quantkit.report import format_numbers
from quantkit.report.table import Table

SHOWN = 5
"""Rows of the table in a terminal; the page has all."""
CONTEXT = 48
"""Characters of context in a table."""
KL = "KL(source || artifact) of the prediction at this token, in nats."
AFTER = "End of the text before the token."
TRUE = "The token that the text has there, with the probability that each model gives it."
TOP = "Most probable next token, with its probability."
ALIKE = "Tokens whose context begins an earlier document too are listed once."


def make_token_table(fidelity: Fidelity, limit: int = SHOWN) -> Table:
    """Return the tokens with the largest KL: context, true token, the best guess of both models."""
    rows = tuple(
        (
            quote_context(row.context, is_cut=row.is_cut),
            f"{quote_token(row.token)} {format_share(row.p_source)} to "
            f"{format_share(row.p_artifact)}",
            format_numbers.format_digits(row.kl),
            format_choice(row.source),
            format_choice(row.artifact),
            row.kind,
        )
        for row in fidelity.worst_tokens[:limit]
    )
    total = len(fidelity.worst_tokens)
    rest = f"The worst {len(rows)} of the {total} on the page. " if len(rows) < total else ""
    return Table(
        title="Worst tokens",
        columns=("after", "true token", ">KL", "source says", "artifact says", "text"),
        rows=rows,
        note=rest + ALIKE if rows else "",
        meanings=(
            ("after", AFTER),
            ("true token", TRUE),
            ("KL", KL),
            ("source says", TOP),
            ("artifact says", TOP),
        ),
    )


def describe_no_tokens(fidelity: Fidelity) -> str:
    """Return why a report shows no token: one sentence; "" if it shows some."""
    if fidelity.worst_tokens:
        return ""
    if not fidelity.keeps_text:
        return (
            "The artifact holds none of the fidelity text, which is of your own files: set "
            "fidelity.keep_text: true to see the worst tokens; it is published with the artifact."
        )
    if any(row.domain == ALL_TEXT for row in fidelity.distribution):
        return (
            "An earlier version of quantkit made this report and kept no text of the tokens: "
            "build the artifact again to see them."
        )
    return "No token was measured."


def format_choice(choices: Choices) -> str:
    """Return '" Paris" 62 %': the most probable token; "" without any."""
    return f"{quote_token(choices[0].text)} {format_share(choices[0].p)}" if choices else ""


def format_share(p: float) -> str:
    """Return a probability as "62 %", "0.31 %", "<0.01 %"."""
    percent = 100 * p
    if 0 < percent < 0.01:
        return "<0.01 %"
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def quote_token(text: str) -> str:
    r"""Return a token in quotes on one line: white space and control characters as in "\n"."""
    return json.dumps(text, ensure_ascii=False)


def quote_context(text: str, is_cut: bool, limit: int = CONTEXT) -> str:
    """Return the end of a context in quotes on one line, with an ellipsis if it is cut."""
    dots = "…" if is_cut or len(text) > limit else ""
    return dots + quote_token(text[-limit:])
