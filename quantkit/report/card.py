"""The model card: README.md of an artifact, rendered from its fidelity report. Pure but for its template."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.report import format_numbers, markdown, tables

MAX_CHARACTERS = 60_000
"""A model card should also fit into a comment on GitHub, which takes 65,536."""

_LIMITS = (
    (markdown.ROWS, markdown.CELL),
    (40, 160),
    (12, 100),
    (4, 40),
)  # rows of a table, characters of a cell
_MOST_RESULTS = 40
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def render_card(fidelity: Fidelity) -> str:
    """README.md, always under 60,000 characters: tables are cut where they must be, and say so."""
    text = ""
    for rows, cell in _LIMITS:
        text = _rendered(fidelity, rows, cell)
        if len(text) < MAX_CHARACTERS:
            break
    return text


def _rendered(fidelity: Fidelity, rows: int, cell: int) -> str:
    environment = Environment(
        loader=PackageLoader("quantkit.report", "templates"),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, not HTML; the filters take care of text from elsewhere
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["table"] = lambda made: markdown.format_table(made, rows, cell)
    environment.filters["cell"] = lambda text: markdown.escape_cell(text, cell)
    environment.filters["code"] = lambda text: markdown.format_code_block(text, 4 * cell)
    environment.filters["size"] = format_numbers.format_size
    environment.filters["parameters"] = format_numbers.format_parameters
    text = environment.get_template("card.md.j2").render(
        fidelity=fidelity,
        head=format_front_matter(fidelity, cell),
        rows=rows,
        tables=tables,
        verdict=format_verdict(fidelity),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def format_front_matter(fidelity: Fidelity, limit: int = markdown.CELL) -> str:
    """What the model hub reads: the source's licence, and that this is a quantized version of it."""
    source, artifact = fidelity.source, fidelity.artifact
    return markdown.format_front_matter({
        "license": source.license.id[:limit] if source.license else None,
        "license_name": source.license.name[:limit]
        if source.license and source.license.name
        else None,
        "license_link": source.license.link[:limit]
        if source.license and source.license.link
        else None,
        "base_model": source.model if _HUB_ID.fullmatch(source.model) else None,
        "base_model_relation": "quantized",
        "quantized_by": artifact.quantized_by[:limit],
        "library_name": source.library_name[:limit],
        "pipeline_tag": source.pipeline_tag[:limit],
        "tags": [tag[:limit] for tag in (*artifact.tags, "quantkit")][-40:],
        "model-index": build_model_index(fidelity, limit),
    })


def build_model_index(
    fidelity: Fidelity, limit: int = markdown.CELL
) -> list[dict[str, object]] | None:
    """The benchmarks as the model hub shows them, scores from 0 to 1; None where nothing was scored."""
    results = [
        {
            "task": {"type": fidelity.source.pipeline_tag[:limit]},
            "dataset": {"type": row.task[:limit], "name": row.task[:limit]},
            "metrics": [
                {
                    "type": (row.metric or "score")[:limit],
                    "value": row.artifact,
                    "name": f"{row.metric[:limit] or 'score'}, {row.n} items",
                }
            ],
        }
        for row in fidelity.benchmarks
        if row.status == "ok" and row.artifact is not None
    ]
    return (
        [{"name": fidelity.artifact.name[:limit], "results": results[:_MOST_RESULTS]}]
        if results
        else None
    )


def format_verdict(fidelity: Fidelity) -> str:
    """One sentence on the gates."""
    missed = sum(row.ok is False for row in fidelity.gates)
    open_ = sum(row.ok is None for row in fidelity.gates)
    if fidelity.status == "accepted":
        return f"Accepted: it keeps all {len(fidelity.gates)} gates of its recipe."
    if fidelity.status == "rejected":
        return f"Rejected: it misses {missed} of the {len(fidelity.gates)} gates of its recipe."
    return (
        f"Not judged: {open_} of {len(fidelity.gates)} gates have no figure."
        if open_
        else "Not judged: no gates."
    )
