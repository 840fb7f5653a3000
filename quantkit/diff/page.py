"""A comparison as one page for people, in the style of fidelity.html and under the same content policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantkit.diff import tables, views
from quantkit.diff.charts import make_charts
from quantkit.diff.sides import TokenFigures
from quantkit.diff.values import Diff, Distribution, Flip
from quantkit.report import format_numbers, html
from quantkit.report.html import Tile
from quantkit.report.samples import ChangedItem

ROWS = 200  # of the tables of modules, blocks and routers
NAMES = 400  # lines of folded names per group


def render_page(diff: Diff, a: TokenFigures | None = None, b: TokenFigures | None = None) -> str:
    """The whole page. `a`, `b`: the tokens behind the distributions, for the plot of their tails."""
    made = html.environment(autoescape=True)
    made.filters["party"] = views.party_text
    made.filters["tone"] = choose_tone
    items = html.shown_items([make_changed_item(flip) for flip in diff.flips])
    return made.get_template("diff.html.j2").render(
        diff=diff,
        items=items,
        hidden=len(diff.flips) - len(items),
        tables=tables,
        tiles=make_tiles(diff),
        headline=tables.format_headline(diff),
        intervals=html.intervals([row.delta_pp for row in diff.benchmarks]),
        rows=ROWS,
        names=NAMES,
        **html.drawn(made, make_charts(diff, a, b), ("fidelity.css", "diff.css")),
    )


def make_changed_item(flip: Flip) -> ChangedItem:
    """A flipped item as the report's page shows changed ones: A in the place of the source."""
    return ChangedItem(
        task=flip.task,
        item=flip.item,
        prompt=flip.prompt,
        target=flip.target,
        source=flip.a,
        artifact=flip.b,
    )


def choose_tone(text: str) -> str:
    """The class of a cell that says which way something went."""
    word = text.split(":")[0].split("(")[0].strip().lower()
    return {
        "better": "good",
        "as good": "good",
        "worse": "bad",
        "gained": "good",
        "lost": "bad",
    }.get(word, "open")


def make_tiles(diff: Diff) -> list[Tile]:
    """The figures that a reader wants first: B's, with A's below."""
    found = []
    for row in diff.sizes:
        if (
            row.a is None
            or row.b is None
            or row.name not in ("weights", "bits per quantized weight")
        ):
            continue
        a, b = (
            format_numbers.format_size(round(v)) if row.unit == "B" else f"{v:.2f}"
            for v in (row.a, row.b)
        )
        label = "Size" if row.unit == "B" else "Bits per weight"
        found.append(Tile(label=label, value=b, note="as A" if a == b else f"from {a}"))
    found += _distribution_tiles(diff.distribution)
    if diff.compared_items:
        lost = sum(flip.lost for flip in diff.flips)
        value = f"{lost} / {len(diff.flips) - lost}"
        found.append(
            Tile(label="Items lost / gained", value=value, note=f"of {diff.compared_items:,}")
        )
    return found


def _distribution_tiles(rows: Sequence[Distribution]) -> list[Tile]:
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "kl_mean": ("Mean KL", format_numbers.format_digits),
        "ppl_artifact": ("Perplexity", "{:.4f}".format),
        "top1": ("Same top token", format_numbers.format_percent),
    }
    found = []
    for row in rows:
        if row.domain == "all" and row.figure in shown and row.a is not None and row.b is not None:
            label, told = shown[row.figure]
            sure = f", {row.resolved}" if row.resolved else ""
            found.append(Tile(label=label, value=told(row.b), note=f"from {told(row.a)}{sure}"))
    return found
