"""The comparison as one HTML page, with the style and content security policy of fidelity.html."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import Environment

from quantkit.diff import tables
from quantkit.diff.charts import make_charts
from quantkit.diff.diff_schema import Diff, DistributionDiff, FlippedItem, KLDiff
from quantkit.diff.token_tables import LARGER, SENTENCES, TYPICAL
from quantkit.diff.token_texts import TokenFigures
from quantkit.figure_readers import ALL_TEXT
from quantkit.figures import find_figure
from quantkit.report import format_numbers, html_page
from quantkit.report.html_page import Tile
from quantkit.report.samples import ChangedItem
from quantkit.report.token_tables import ALIKE

ROWS = 200  # rows of the tables of modules, blocks and routers
NAMES = 400  # lines of folded names per group


def render_page(diff: Diff, a: TokenFigures | None = None, b: TokenFigures | None = None) -> str:
    """Return the page; `a` and `b` are the tokens of both sides, for the plot of the tails."""
    environment = make_environment()
    items = html_page.select_items([make_changed_item(flip) for flip in diff.flips])
    return environment.get_template("diff.html.j2").render(
        diff=diff,
        items=items,
        hidden=len(diff.flips) - len(items),
        tables=tables,
        tiles=make_tiles(diff),
        alike=ALIKE,
        headline=diff.headline,
        intervals=html_page.draw_intervals([row.delta_pp for row in diff.benchmarks]),
        rows=ROWS,
        names=NAMES,
        **html_page.make_plot_context(
            environment, make_charts(diff, a, b), ("fidelity.css", "diff.css")
        ),
    )


@cache
def make_environment() -> Environment:
    """Return the environment of the page of the comparison."""
    environment = html_page.make_environment(autoescape=True)
    environment.filters["tone"] = choose_tone
    return environment


def make_changed_item(flip: FlippedItem) -> ChangedItem:
    """Return a flipped item as a changed item of the report's page, with A as the source."""
    return ChangedItem(
        task=flip.task,
        item=flip.item,
        prompt=flip.prompt,
        target=flip.target,
        source=flip.a,
        artifact=flip.b,
    )


def choose_tone(text: str) -> str:
    """Return the CSS class of a cell with a result."""
    word = text.split(":")[0].split("(")[0].strip().lower()
    return {
        "better": "good",
        "as good": "good",
        "worse": "bad",
        "gained": "good",
        "lost": "bad",
    }.get(word, "open")


def make_tiles(diff: Diff) -> list[Tile]:
    """Return the tiles: values of B, with those of A below."""
    tiles = _make_kl_tiles(diff.kl) + _make_distribution_tiles(diff.distribution)
    for row in diff.sizes:
        if (
            row.a is None
            or row.b is None
            or row.name not in ("weights", "bits per weight, all tensors")
        ):
            continue
        a, b = (
            format_numbers.format_size(round(v)) if row.unit == "B" else f"{v:.2f}"
            for v in (row.a, row.b)
        )
        label = "Size" if row.unit == "B" else "Bits per weight"
        tiles.append(Tile(label=label, value=b, note="same as A" if a == b else f"from {a}"))
    if diff.compared_items:
        lost = sum(flip.lost for flip in diff.flips)
        value = f"{lost} / {len(diff.flips) - lost}"
        tiles.append(
            Tile(label="Items lost / gained", value=value, note=f"of {diff.compared_items:,}")
        )
    return tiles


def _make_kl_tiles(rows: Sequence[KLDiff]) -> list[Tile]:
    """Return the tiles of the figures over all text that heavy tails do not break."""
    row = next((row for row in rows if row.domain == ALL_TEXT), None)
    if row is None:
        return []
    value, _, interval = format_numbers.format_factors(row.typical).partition(" ")
    share, _, ends = format_numbers.format_figure(row.larger, "percent").partition(" [")
    return [
        Tile(
            label=TYPICAL,
            value=value,
            note=f"{row.typical_resolved} {interval}",
            meaning=SENTENCES[TYPICAL],
        ),
        Tile(
            label="Tokens with larger KL",
            value=share,
            note=f"{row.larger_resolved} [{ends}",
            meaning=SENTENCES[LARGER],
        ),
    ]


def _make_distribution_tiles(rows: Sequence[DistributionDiff]) -> list[Tile]:
    """Return the tiles of the figures that the table gives one, over all text."""
    tiles = []
    for row in rows:
        figure = find_figure(row.figure)
        if figure is None or not figure.diff_tile or row.domain != ALL_TEXT:
            continue
        if row.a is None or row.b is None:
            continue
        a, b = (format_numbers.format_value(figure, value) for value in (row.a, row.b))
        resolution = f", {row.resolved}" if row.resolved else ""
        factor = f": {format_numbers.format_factors(row.ratio)}" if row.ratio else ""
        note = f"from {a}{factor}{resolution}"
        tiles.append(Tile(label=figure.diff_tile, value=b, note=note, meaning=figure.meaning))
    return tiles
