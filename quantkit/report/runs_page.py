"""The artifacts of a folder as one page: KL against size, engines, figures with their intervals.

The page has the style and the content security policy of fidelity.html: text from artifacts is
escaped, plots are data, and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from math import log10

from jinja2 import Environment

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.figure_readers import Reading
from quantkit.figures import FigureDefinition, find_figure
from quantkit.report import format_numbers, html_page, runs
from quantkit.report.charts import (
    Plot,
    Spec,
    compute_log_ticks,
    make_chart,
    make_color_encoding,
)
from quantkit.report.definitions import define_figures
from quantkit.report.format_numbers import INTERVALS, MISSING
from quantkit.report.html_page import Tile
from quantkit.report.runs import NOT_SHOWN, Run, list_run_columns
from quantkit.report.table import Table
from quantkit.report.verdict import format_status

LABELED = 16
"""Points of a plot that have their name next to them."""
NAME = 40  # characters of a name in a plot
WIDTH, HEIGHT, CHARACTER = 560, 320, 6.2  # pixels for which names are placed
SIDES = (("left", 9, -9), ("right", -9, -9), ("left", 9, 10), ("right", -9, 10))
"""Places of a name next to its point: alignment, and pixels to the right and down."""
WIDE = 8  # ratio of sizes above which their axis is logarithmic
Box = tuple[float, float, float, float]
HOW = (
    "Each point is an artifact; the line joins those that no other beats in both size and KL, and "
    "the bars are 95 % intervals. The axis of KL is logarithmic."
)


def render_page(artifacts: Sequence[Run], folder: str) -> str:
    """Return the page of the artifacts of a folder."""
    environment = make_environment()
    groups = group_runs(artifacts)
    plots = {
        f"front{number}": plot
        for number, (label, members) in enumerate(groups.items())
        if (plot := plot_front(label, members, is_only=len(groups) == 1)) is not None
    }
    return environment.get_template("runs.html.j2").render(
        folder=folder,
        tiles=make_tiles(artifacts),
        figures=make_figure_table(artifacts),
        engines=make_engine_table(artifacts),
        scores=runs.make_score_table(artifacts),
        faults=runs.make_fault_table(artifacts),
        **html_page.make_plot_context(environment, plots, ("fidelity.css", "runs.css")),
    )


@cache
def make_environment() -> Environment:
    """Return the environment of the page of artifacts."""
    environment = html_page.make_environment(autoescape=True)
    environment.filters["tone"] = choose_tone
    return environment


def choose_tone(text: str) -> str:
    """Return the CSS class of a status."""
    return {"accepted": "good", "rejected": "bad"}.get(text, "open")


def get_definition(key: str) -> FigureDefinition:
    """Return the row of a figure that quantkit has."""
    definition = find_figure(key)
    assert definition is not None  # the keys here are those of the table
    return definition


# ------------------------------------------------------------------------------------------ tables


def make_figure_table(artifacts: Sequence[Run]) -> Table:
    """Return the artifacts with their figures and intervals; a column of small figures has one
    power of ten. A cell breaks before its interval only.
    """
    known = [(run, run.fidelity) for run in artifacts if run.fidelity is not None]
    definitions = [
        row
        for row in list_run_columns()
        if row.key != NOT_SHOWN and any(row.read(fidelity).is_measured for _, fidelity in known)
    ]
    columns, cells = list[str](), list[list[str]]()
    for definition in definitions:
        readings = [definition.read(fidelity) for _, fidelity in known]
        power = format_numbers.choose_power(definition, readings)
        columns.append(f">{format_numbers.add_power(definition.run_heading, power)}")
        cells.append([format_numbers.format_reading(definition, x, power) for x in readings])
    rows = tuple(
        (run.name, format_factor(fidelity), *(keep_whole(column[number]) for column in cells))
        for number, (run, fidelity) in enumerate(known)
    )
    return Table(
        title="Figures",
        columns=("name", ">smaller", *columns),
        rows=rows,
        note=f"KL in nats per token; size and bits of the whole artifact. {INTERVALS}",
        meanings=define_figures(definition.key for definition in definitions),
    )


def make_engine_table(artifacts: Sequence[Run]) -> Table:
    """Return the artifacts with status, format and the engines that load them."""
    rows = tuple(
        (
            run.name,
            format_status(fidelity),
            "yes" if run.front else "no",
            fidelity.artifact.format,
            list_engines(fidelity),
        )
        for run in artifacts
        if (fidelity := run.fidelity) is not None
    )
    return Table(
        title="Status and engines",
        columns=("name", "status", "front", "format", "loads in"),
        rows=rows,
        note="Front: no other artifact of the same source and text is both smaller and closer to "
        "the source.",
    )


def keep_whole(cell: str) -> str:
    """Return a cell with spaces that do not break, other than the one before its interval."""
    value, bracket, interval = cell.partition(" [")
    return value.replace(" ", "\u00a0") + bracket + interval.replace(" ", "\u00a0")


def list_engines(fidelity: Fidelity) -> str:
    """Return the engines that load an artifact; quantkit.load reads every format."""
    return ", ".join([*(row.engine for row in fidelity.artifact.serving), "quantkit.load"])


def format_factor(fidelity: Fidelity) -> str:
    """Return "1.42x"; "-" without sizes."""
    before, after = fidelity.artifact.bytes_source, fidelity.artifact.bytes_artifact
    return f"{before / after:.2f}x" if before and after else MISSING


def make_tiles(artifacts: Sequence[Run]) -> list[Tile]:
    """Return the number of artifacts, the smallest, and the one closest to its source."""
    known = [run for run in artifacts if run.fidelity is not None]
    broken = len(artifacts) - len(known)
    tiles = [
        Tile(
            label="Artifacts",
            value=f"{len(known):,}",
            note=f"{broken:,} broken" if broken else "all readable",
        )
    ]
    for key, label in (("size", "Smallest"), ("kl_mean", "Lowest mean KL")):
        definition = get_definition(key)
        best = min(
            (
                (reading.value, run.name)
                for run in known
                if (reading := definition.read(run.fidelity)).value is not None
            ),
            default=None,
        )
        if best is not None:
            value = format_numbers.format_value(definition, best[0])
            tiles.append(Tile(label=label, value=value, note=best[1]))
    return tiles


# ------------------------------------------------------------------------------------------- plots


def group_runs(artifacts: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the artifacts by source and fidelity text, within which KL is comparable."""
    groups: dict[str, tuple[str, list[Run]]] = {}
    for run in artifacts:
        if run.fidelity is None or runs.locate_run(run) is None:
            continue
        text = run.fidelity.measured_on
        label = f"{run.fidelity.source.model}, {text.set}" if text else run.fidelity.source.model
        groups.setdefault(runs.find_group(run), (label, []))[1].append(run)
    labeled: dict[str, list[Run]] = {}
    for number, (label, members) in enumerate(groups.values(), start=1):
        labeled[f"{label} ({number})" if label in labeled else label] = members
    return labeled


def plot_front(label: str, members: Sequence[Run], *, is_only: bool) -> Plot | None:
    """Return mean KL against size, with intervals, for the artifacts of one group."""
    rows = [make_point(run, fidelity) for run in members if (fidelity := run.fidelity) is not None]
    positive = [value for row in rows for key in ("low", "kl") if (value := row[key]) > 0]
    if not positive:
        return None
    floor = 10.0 ** (log10(min(positive)) - 0.3)
    for row in rows:
        row.update({key: max(row[key], floor) for key in ("kl", "low", "high")})
    title = "Mean KL against size" if is_only else f"Mean KL against size: {label}"
    zero = " A KL of 0 is drawn at the lower edge." if any(row["is_zero"] for row in rows) else ""
    return title, f"{HOW}{zero}", draw(rows)


def make_point(run: Run, fidelity: Fidelity) -> Spec:
    """Return the values of a point; the ends of an unknown interval are the value."""
    kl = get_definition("kl_mean")
    reading = kl.read(fidelity)
    value = reading.value or 0.0
    low, high = (value if end is None else end for end in reading.ci or (None, None))
    artifact = fidelity.artifact
    return {
        "name": run.name[-NAME:],
        "size": artifact.bytes_artifact / 1e6,
        "kl": value,
        "low": low,
        "high": high,
        "is_zero": value <= 0,
        "format": artifact.format,
        "front": run.front,
        "KL [nats/token]": format_numbers.format_reading(kl, reading),
        "worst kind": format_worst(fidelity),
        "bytes": format_numbers.format_size(artifact.bytes_artifact),
        "bits overall": f"{artifact.bits_overall:.2f}",
        "status": format_status(fidelity),
        "loads in": list_engines(fidelity),
    }


def format_worst(fidelity: Fidelity) -> str:
    """Return the mean KL of the worst kind of text with the kind's name."""
    definition = get_definition("kl_worst_kind")
    reading: Reading = definition.read(fidelity)
    kind = f" ({reading.reason})" if reading.value is not None and reading.reason else ""
    return f"{format_numbers.format_reading(definition, reading)}{kind}"


TOOLTIP = (
    *("name", "bytes", "bits overall", "KL [nats/token]", "worst kind", "status", "format"),
    "loads in",
)


def draw(rows: Sequence[Spec]) -> Spec:
    """Return the scatter: intervals, the line of the front, points by format, names."""
    x, y = make_size_axis([row["size"] for row in rows]), make_kl_axis(rows)
    formats = list(dict.fromkeys(row["format"] for row in rows))
    color = {**make_color_encoding("format", formats), "legend": {"columns": 2}}
    tooltip = [
        {"field": name.replace("[", "\\[").replace("]", "\\]"), "title": name} for name in TOOLTIP
    ]
    layers: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeWidth": 1.6},
            "encoding": {
                "x": x,
                "y": {**y, "field": "low"},
                "y2": {"field": "high"},
                "color": color,
            },
        },
        *draw_front(rows, x, y),
        {
            "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
            "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip},
        },
        *draw_names(rows, x, y),
    ]
    return {**make_chart(rows, {"layer": layers}), "height": HEIGHT}


def draw_front(rows: Sequence[Spec], x: Spec, y: Spec) -> Iterator[Spec]:
    """Yield the line of the front, which needs two artifacts."""
    if sum(row["front"] for row in rows) >= 2:
        yield {
            "transform": [{"filter": "datum.front"}],
            "mark": {"type": "line", "color": "var(--line-strong)", "strokeDash": [4, 3]},
            "encoding": {"x": x, "y": y, "order": {"field": "size"}},
        }


def make_size_axis(sizes: Sequence[float]) -> Spec:
    """Return the axis of sizes in MB, logarithmic over a wide range."""
    is_wide = max(sizes) / min(sizes) > WIDE
    axis: Spec = {"format": ",~f", "grid": False, "tickCount": 6}
    if is_wide:
        axis["values"] = list_ticks(sizes)
    scale = {"type": "log" if is_wide else "linear", "zero": False, "nice": False, "padding": 30}
    return {
        "field": "size",
        "type": "quantitative",
        "title": "size [MB]",
        "scale": scale if not is_wide else {k: v for k, v in scale.items() if k != "zero"},
        "axis": axis,
    }


def make_kl_axis(rows: Sequence[Spec]) -> Spec:
    """Return the logarithmic axis of KL."""
    return {
        "field": "kl",
        "type": "quantitative",
        "title": "mean KL [nats/token]",
        "scale": {"type": "log", "nice": False, "padding": 12},
        "axis": {
            "values": list_ticks([row[key] for row in rows for key in ("low", "high")]),
            "format": "~g",
        },
    }


def draw_names(rows: Sequence[Spec], x: Spec, y: Spec) -> Iterator[Spec]:
    """Yield the names next to the points, each at a side where it covers no other; of many points
    those of the front.
    """
    named = rows if len(rows) <= LABELED else [row for row in rows if row["front"]]
    sides = place_names(named, rows)
    for number, (align, shift, rise) in enumerate(SIDES):
        values = [
            {"size": row["size"], "kl": row["kl"], "name": row["name"]}
            for row, side in zip(named, sides, strict=True)
            if side == number
        ]
        if values:
            yield {
                "data": {"values": values},
                "mark": {"type": "text", "align": align, "dx": shift, "dy": rise, "fontSize": 11},
                "encoding": {"x": x, "y": y, "text": {"field": "name"}},
            }


def place_names(named: Sequence[Spec], rows: Sequence[Spec]) -> list[int]:
    """Return for each name the first of SIDES where it covers no point and no other name, on a plot
    of WIDTH x HEIGHT; the first of all if there is none.
    """
    sizes, errors = [row["size"] for row in rows], [log10(row["kl"]) for row in rows]

    def locate(row: Spec) -> tuple[float, float]:
        across = (row["size"] - min(sizes)) / ((max(sizes) - min(sizes)) or 1)
        up = (log10(row["kl"]) - min(errors)) / ((max(errors) - min(errors)) or 1)
        return 30 + across * (WIDTH - 60), HEIGHT - 12 - up * (HEIGHT - 24)

    taken = [(left - 6, left + 6, top - 6, top + 6) for left, top in map(locate, rows)]
    chosen = []
    for row in named:
        left, top = locate(row)
        boxes = []
        for align, shift, rise in SIDES:
            length = CHARACTER * len(row["name"])
            start = left + shift - (length if align == "right" else 0)
            boxes.append((start, start + length, top + rise - 7, top + rise + 7))
        free = (
            number
            for number, box in enumerate(boxes)
            if box[0] >= 0 and box[1] <= WIDTH and not any(overlap(box, other) for other in taken)
        )
        side = next(free, 0)
        taken.append(boxes[side])
        chosen.append(side)
    return chosen


def overlap(a: Box, b: Box) -> bool:
    """Return whether two boxes (left, right, top, bottom) overlap."""
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def list_ticks(values: Sequence[float]) -> list[float]:
    """Return round numbers over the range of positive values, at least two."""
    low, high = min(values), max(values)
    low, high = (low / 1.6, high * 1.6) if high / low < 1.6 else (low, high)
    return [tick for tick in compute_log_ticks(low, high) if low / 2 <= tick <= high * 2]
