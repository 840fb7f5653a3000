"""quantkit/fidelity.html: the report as a self-contained page, from fidelity.json and samples.

Text from models and checkpoints is untrusted: the template escapes everything, plots are data, and
the content security policy allows only the two scripts that it names by hash. The page fetches
nothing. Vega-Lite draws the plots; its code comes from the package vl-convert-python. The same
report with the same versions gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quantkit.artifact.fidelity_schema import Fidelity, Figure
from quantkit.artifact.layout import MANIFEST, PAGE
from quantkit.artifact.read_manifest import get_section, read_manifest
from quantkit.artifact.read_report import read_report, read_sealed_report
from quantkit.errors import ArtifactError
from quantkit.figure_readers import ALL_TEXT
from quantkit.figures import FigureDefinition, list_headline_figures
from quantkit.io import user_cache
from quantkit.io.files import is_file, write_atomic, write_output
from quantkit.io.path_safety import check_no_link
from quantkit.report import (
    engine_tables,
    format_numbers,
    module_ranges,
    notes,
    reproduce,
    tables,
    token_tables,
    verdict,
)
from quantkit.report.charts import CONFIG, Plot, make_charts
from quantkit.report.definitions import HEADINGS, Meanings
from quantkit.report.samples import Answer, ChangedItem, Samples, read_samples

WORST = 200  # modules in the table
FOLDED = 400  # lines of folded names per fallback
BEFORE, AFTER = 700, 1_400  # characters of an answer shown around its first difference
PROMPT = 2_000  # characters at the end of a prompt
ITEMS_BYTES = 1_100_000  # of all changed items together
_KEPT = "\n\t\r\u200c\u200d"  # line ends, tabs, and joiners of Indic scripts and emoji
_WORD = re.compile(
    r"[^\W\u3040-\u9fff]{1,24}|\s|.", re.DOTALL
)  # a word or number; one character of a script without spaces


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure in the head of a page."""

    label: str
    value: str
    note: str = ""
    meaning: str = ""  # the sentence that defines it


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A part of an answer around the first difference from the other answer."""

    before: str
    differs: str
    after: str
    cut_before: int
    cut_after: int


@dataclass(frozen=True, kw_only=True)
class ShownItem:
    """A changed item with excerpts of its prompt and both answers."""

    changed: ChangedItem
    prompt: str
    cut_prompt: int
    source: Excerpt
    artifact: Excerpt


def rebuild_page(artifact: Path, output: Path | None = None) -> Path:
    """Rebuild the page of an artifact, inside the artifact unless `output` names another file.

    Raises ArtifactError if a file of the report does not match the manifest, and if the page inside
    the artifact would get other bytes than the manifest names; UsageError for a link in its place.
    """
    files: Mapping[str, object] = {}
    if output is None or is_file(artifact / MANIFEST):
        files = get_section(read_manifest(artifact), "files", artifact)
        read_sealed_report(
            artifact, absent=(PAGE, *(name for name in files if not is_file(artifact / name)))
        )
    content = make_page(artifact).encode()
    if output is None:
        entry = files.get(PAGE)
        if (
            not isinstance(entry, Mapping)
            or entry.get("sha256") != hashlib.sha256(content).hexdigest()
        ):
            raise ArtifactError(
                f"{artifact / MANIFEST}: {PAGE}: expected the page that these files make, found "
                "another or none (made with other versions?); write it elsewhere with --output FILE"
            )
        page = check_no_link(artifact, PAGE)
        write_atomic(page, content)
        return page
    write_output(output, content)
    return output


def make_page(artifact: Path) -> str:
    """Return the page of an artifact's folder, complete or not. Raises ArtifactError."""
    fidelity = read_report(artifact)
    filters = {row.task: row.metric for row in fidelity.benchmarks}
    return render_page(fidelity, read_samples(artifact, filters))


def render_page(fidelity: Fidelity, samples: Samples) -> str:
    """Return the page of a report and its samples."""
    environment = make_report_environment()
    items = select_items(samples.changed)
    return environment.get_template("fidelity.html.j2").render(
        fidelity=fidelity,
        samples=samples,
        items=items,
        hidden=len(samples.changed) - len(items),
        tables=tables,
        engine_tables=engine_tables,
        notes=notes,
        tiles=make_tiles(fidelity),
        alike=token_tables.ALIKE,
        no_tokens=token_tables.describe_no_tokens(fidelity),
        verdict=verdict.format_verdict(fidelity),
        status=verdict.choose_status(fidelity),
        intervals=draw_intervals([row.delta_pp for row in fidelity.benchmarks]),
        worst=WORST,
        same_bytes=reproduce.SAME_BYTES,
        folded_lines=FOLDED,
        **make_plot_context(
            environment, make_charts(fidelity, samples.histogram), ("fidelity.css",)
        ),
    )


def make_plot_context(
    environment: Environment, plots: Mapping[str, Plot], styles: Sequence[str]
) -> dict[str, object]:
    """Return the template variables that every page needs: plots, both scripts, styles, hashes."""
    vega, own = load_vega_bundle(), read_template(environment, "fidelity.js")
    return {
        "plots": plots,
        "drawings": {
            "config": CONFIG,
            "specs": {name: spec for name, (_, _, spec) in plots.items()},
        },
        "vega": Markup(vega),
        "script": Markup(own),
        "style": Markup("".join(read_template(environment, name) for name in styles)),
        "hashes": [compute_csp_hash(vega), compute_csp_hash(own)],
    }


@cache
def make_report_environment() -> Environment:
    """Return the environment of the report's page."""
    environment = make_environment(autoescape=True)
    environment.filters["tone"] = choose_tone
    return environment


def make_environment(*, autoescape: bool) -> Environment:
    """Return the environment of the templates; invisible characters are replaced.

    Each page adds its filters and keeps its environment, which holds the compiled templates: to
    compile them takes longer than to render them.
    """
    environment = Environment(
        loader=PackageLoader("quantkit.report", "templates"),
        undefined=StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=replace_invisible,
    )
    environment.filters |= {
        "size": format_numbers.format_size,
        "parameters": format_numbers.format_parameters,
        "count": format_numbers.format_count,
        "json": format_json,
        "folded": module_ranges.fold_names,
        "definitions": list_definitions,
        "columns": count_columns,
        "nats": format_numbers.format_digits,
        "quoted": token_tables.quote_token,
        "share": token_tables.format_share,
    }
    return environment


@cache
def load_vega_bundle() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script of 0.9 MB.

    Bundling takes 1.4 s and 100 MB of memory, so the script is cached on disk.
    """
    return user_cache.load_or_make_text(
        user_cache.locate_folder("charts") / f"vega-{version('vl-convert-python')}.js",
        build_vega_bundle,
    )


def build_vega_bundle() -> str:
    """Return the script as vl-convert bundles it."""
    from vl_convert import javascript_bundle  # 85 MB

    return str(javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")


def compute_csp_hash(script: str) -> str:
    """Return the hash by which a content security policy names a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def format_json(value: object) -> Markup:
    """Return JSON that cannot end a script element."""
    text = json.dumps(
        _replace_all(value), ensure_ascii=True, allow_nan=False, separators=(",", ":")
    )
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def replace_invisible(value: object) -> object:
    """Replace control characters, lone surrogates and bidirectional marks by U+FFFD."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(
        c if c.isprintable() or c in _KEPT or (c > "\x9f" and c.isspace()) else "\ufffd"
        for c in value
    )


def _replace_all(value: object) -> object:
    if isinstance(value, dict):
        return {key: _replace_all(item) for key, item in value.items()}
    return (
        [_replace_all(item) for item in value]
        if isinstance(value, list | tuple)
        else replace_invisible(value)
    )


def choose_tone(text: str) -> str:
    """Return the CSS class of a cell with a result."""
    word = text.split(":")[0].split("(")[0].strip().lower()
    return {"pass": "good", "fail": "bad", "kept": "good", "missed": "bad"}.get(word, "open")


def make_tiles(fidelity: Fidelity) -> list[Tile]:
    """Return the figures of the page's head: those that the table gives a tile, then recovery."""
    tiles = [
        tile
        for definition in list_headline_figures()
        if definition.tile and (tile := _make_tile(definition, fidelity))
    ]
    recoveries = [
        (row.recovery.value, row.task)
        for row in fidelity.benchmarks
        if row.recovery and row.recovery.value is not None
    ]
    if recoveries:
        lowest, task = min(recoveries)
        note = f"{task}, the lowest of {len(recoveries)}" if len(recoveries) > 1 else task
        value = format_numbers.format_percent(lowest)
        meaning = HEADINGS["recovery [95 % CI]"]
        tiles.append(Tile(label="Recovery", value=value, note=note, meaning=meaning))
    return tiles


def _make_tile(definition: FigureDefinition, fidelity: Fidelity) -> Tile | None:
    """Return a figure's tile; None if it was not measured."""
    text = format_numbers.format_reading(definition, definition.read(fidelity))
    value, _, interval = text.partition(" [")
    if value == format_numbers.MISSING:
        return None
    note = definition.tile_note
    if definition.key == "size":
        value, _, note = _format_size_change(fidelity).partition(", ")
    tokens = next((row.tokens for row in fidelity.distribution if row.domain == ALL_TEXT), 0)
    bits = f"{fidelity.artifact.bits_per_weight:.2f}"
    note = note.format(tokens=f"{tokens:,}", bits=bits)
    return Tile(
        label=definition.tile,
        value=value,
        note=f"{note}, [{interval}" if interval else note,
        meaning=definition.meaning,
    )


def _format_size_change(fidelity: Fidelity) -> str:
    """Return "1.22x smaller, 6.39 MB from 7.80 MB"."""
    artifact = fidelity.artifact
    return format_numbers.format_size_change(artifact.bytes_source, artifact.bytes_artifact)


def count_columns(tiles: Sequence[Tile], most: int) -> int:
    """Return the number of columns, at most `most`, whose last row of tiles is fullest."""
    n = max(1, len(tiles))
    widest = min(most, n)
    columns = range(widest, min(most // 2, widest - 1), -1)
    return max(columns, key=lambda count: (n % count or count) / count)


def list_definitions(tiles: Sequence[Tile]) -> Meanings:
    """Return label and sentence of the tiles that have one."""
    return tuple((tile.label, tile.meaning) for tile in tiles if tile.meaning)


def draw_intervals(differences: Sequence[Figure | None]) -> dict[int, Markup]:
    """Return a drawing of each difference with its interval, by row, on one common scale."""
    known = {
        n: (low, figure.value, high)
        for n, figure in enumerate(differences)
        if figure and figure.value is not None and figure.ci
        for low, high in [figure.ci]
        if low is not None and high is not None
    }
    limit = max((max(abs(low), abs(high)) for low, _, high in known.values()), default=1.0) or 1.0
    return {
        n: _draw_interval(*(60 + 56 * value / limit for value in values))
        for n, values in known.items()
    }


def _draw_interval(low: float, middle: float, high: float) -> Markup:
    side = "ci-bad" if high < 60 else "ci-good" if low > 60 else "ci-open"
    return Markup(
        '<svg class="ci {}" viewBox="0 0 120 16" width="120" height="16" aria-hidden="true"><line '
        'class="zero" x1="60" x2="60" y1="0" y2="16"/><line x1="{:.1f}" x2="{:.1f}" y1="8" '
        'y2="8"/><circle cx="{:.1f}" cy="8" r="3"/></svg>'
    ).format(side, low, high, middle)


def select_items(changed: Sequence[ChangedItem]) -> list[ShownItem]:
    """Return the changed items that fit into the page, each cut around its first difference."""
    shown: list[ShownItem] = []
    bytes_left = ITEMS_BYTES
    for item in changed:
        entry = ShownItem(
            changed=item,
            prompt=item.prompt[-PROMPT:],
            cut_prompt=max(0, len(item.prompt) - PROMPT),
            source=cut_excerpt(item.source, item.divergence),
            artifact=cut_excerpt(item.artifact, item.divergence),
        )
        sides = (entry.source, entry.artifact)
        texts = (
            entry.prompt,
            item.target[:PROMPT],
            *(part for s in sides for part in (s.before, s.differs, s.after)),
        )
        bytes_left -= 1_500 + sum(len(escape(text).encode("utf-8", "replace")) for text in texts)
        if bytes_left < 0:
            break
        shown.append(entry)
    return shown


def cut_excerpt(answer: Answer, place: int) -> Excerpt:
    """Return the answer around position `place`, cut if it is long.

    The word with the first difference is a part of its own.
    """
    text = answer.text
    start = place
    while (
        start > max(0, place - 24)
        and _is_word(text[start - 1 : start])
        and _is_word(text[start : start + 1] or "x")
    ):
        start -= 1
    match = _WORD.match(text, start)
    end = max(match.end(), min(place + 1, len(text))) if match else start
    first, last = max(0, start - BEFORE), min(len(text), end + AFTER)
    return Excerpt(
        before=text[first:start],
        differs=text[start:end],
        after=text[end:last],
        cut_before=first,
        cut_after=len(text) - last,
    )


def _is_word(character: str) -> bool:
    return bool(re.fullmatch(r"[^\W\u3040-\u9fff]", character))


def read_template(environment: Environment, name: str) -> str:
    """Return a file next to the templates, unrendered."""
    loader = environment.loader
    assert loader is not None  # see make_environment
    return loader.get_source(environment, name)[0]
