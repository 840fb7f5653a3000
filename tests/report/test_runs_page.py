"""`quantkit runs --html`: KL against size, engines, intervals, escaping."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.command_line import read_error, run
from support.report_pages import HOSTILE, LIMIT_BYTES, Page
from support.report_variants import make_example
from support.runs_example import make_run, make_runs

from quantkit.report import html_page, runs_page
from quantkit.report.runs import Run, make_run_table, mark_front


def read_page(runs: list[Run], folder: str = "artifacts") -> Page:
    return Page(runs_page.render_page(runs, folder))


def read_points(page: Page, name: str = "front0") -> dict[str, dict[str, object]]:
    """Return the points of a plot by artifact."""
    return {row["name"]: row for row in page.drawings["specs"][name]["data"]["values"]}


def test_points_have_size_kl_interval_engines_and_front() -> None:
    points = read_points(read_page(make_runs()))
    assert list(points) == ["tiny-awq4", "tiny-rtn4", "tiny-gptq3", "tiny-awq8"]
    point = points["tiny-gptq3"]
    assert (point["size"], point["kl"]) == (4.9, 0.009)
    assert (point["low"], point["high"]) == (pytest.approx(0.0072), pytest.approx(0.0117))
    assert point["loads in"] == "vLLM, quantkit.load" and point["bits overall"] == "5.37"
    assert point["worst kind"] == "0.0180 (math)"
    assert point["status"] == "accepted, 1 not proven"
    assert [name for name, row in points.items() if row["front"]] == [
        "tiny-awq4",
        "tiny-gptq3",
        "tiny-awq8",
    ]


def test_tables_have_intervals_overall_bits_engines_and_faults() -> None:
    words = re.sub(r"\s+", " ", " ".join(read_page(make_runs()).words))
    for cell in ("0.0090 [0.0072, 0.0117]", "5.37", "vLLM, quantkit.load", "1.59x", "rejected"):
        assert cell in words, cell
    assert "accepted, 1 not proven" in words
    assert "half.building" in words and "an interrupted build" in words
    assert "coverage" not in words  # no artifact has it
    assert "Intervals in brackets are 95 %." in words


def test_kl_of_other_sources_has_a_plot_of_its_own() -> None:
    other = [
        make_run("smol", 10**8, 0.05, source="org/smol"),
        make_run("b", 2 * 10**9, 0.01, source="org/smol"),
    ]
    page = read_page(mark_front([*make_runs(), *other]))
    assert list(page.drawings["specs"]) == ["front0", "front1"]
    assert set(read_points(page, "front1")) == {"smol", "b"}
    spec = page.drawings["specs"]["front1"]["layer"][0]["encoding"]["x"]
    assert spec["scale"]["type"] == "log" and len(spec["axis"]["values"]) >= 3
    assert "Mean KL against size: org/smol, tiny-v3-heldout" in " ".join(page.words)


def test_vega_lite_compiles_the_plot() -> None:
    from vl_convert import vegalite_to_vega

    drawings = read_page(make_runs()).drawings
    for spec in drawings["specs"].values():
        assert vegalite_to_vega({**spec, "config": drawings["config"]})["marks"]


def test_kl_of_zero_and_unmeasured_artifacts() -> None:
    copy, unmeasured = (
        make_run("copy", 7_800_000, 0.0),
        Run(name="none", fidelity=make_example({"distribution": []})),
    )
    page = read_page(mark_front([*make_runs(), copy, unmeasured]))
    points = read_points(page)
    assert "none" not in points and 0 < points["copy"]["kl"] < 0.00001  # type: ignore[operator]
    assert "A KL of 0 is drawn at the lower edge." in " ".join(page.words)
    alone = read_page([copy, unmeasured])
    assert alone.drawings["specs"] == {}
    assert "No artifact has a measured KL." in " ".join(alone.words)
    assert "No readable artifact." in " ".join(read_page([]).words)


def test_names_cover_neither_each_other_nor_a_point() -> None:
    runs = mark_front([make_run(f"artifact-{n}", 6_000_000 + 1000 * n, 0.001) for n in range(4)])
    spec = read_page(runs).drawings["specs"]["front0"]
    texts = [layer for layer in spec["layer"] if layer["mark"]["type"] == "text"]
    placed = {layer["mark"]["align"] + str(layer["mark"]["dy"] > 0) for layer in texts}
    assert len(placed) > 1
    assert sum(len(layer["data"]["values"]) for layer in texts) == 4
    many = mark_front([make_run(f"a{n}", 10**6 * (n + 1), 0.1 / (1 + n)) for n in range(20)])
    assert len(runs_page.place_names([], [])) == 0
    named = [
        row
        for layer in read_page([replace(x, front=n < 3) for n, x in enumerate(many)]).drawings[
            "specs"
        ]["front0"]["layer"]
        if layer["mark"]["type"] == "text"
        for row in layer["data"]["values"]
    ]
    assert len(named) == 3  # of many points those of the front


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_names_and_figures_are_escaped(attack: str) -> None:
    clean = attack.encode("utf-8", "ignore").decode()
    pages = []
    for text in (clean, "x" * len(clean)):
        run = make_run(text, 5_000_000, 0.001, format_name=text, source=text)
        pages.append(Page(runs_page.render_page([run, Run(name=text, fault=text)], text)))
    bad, good = pages
    assert bad.tags == good.tags
    assert bad.scripts[1:] == good.scripts[1:] and len(bad.scripts) == 3
    assert "<" not in bad.scripts[0] and "\\u202e" not in bad.scripts[0]
    assert not set("".join(bad.words)) & set("\x00\x1b\u202e")


def test_page_fetches_nothing_and_names_its_scripts() -> None:
    page = read_page(make_runs())
    policy = next(value for name, value in page.values if value.startswith("default-src"))
    assert re.findall(r"'(sha256-[^']+)'", policy) == [
        html_page.compute_csp_hash(script) for script in page.scripts[1:]
    ]
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "base", "form"}
    assert all(value.startswith("#") for name, value in page.values if name in {"href", "src"})
    assert len(runs_page.render_page(make_runs() * 100, "a").encode()) < LIMIT_BYTES


def test_command_writes_the_page_and_json_has_engines_and_intervals(
    built: Path, tmp_path: Path
) -> None:
    shelf, page = built.parent, tmp_path / "runs.html"
    done = run("runs", shelf, "--html", "--output", page)
    assert done.exit_code == 0 and done.stdout == f"{page}\n"
    assert built.name in read_points(Page(page.read_text()))
    assert run("runs", shelf, "--html").stdout.startswith("<!doctype html>")
    assert "expected --html" in read_error(run("runs", shelf, "--output", page), 2)
    assert "one of them at most" in read_error(run("runs", shelf, "--html", "--json"), 2)
    values = json.loads(run("runs", shelf, "--json").stdout)
    found = next(row for row in values if row["name"] == built.name)
    assert "vLLM" in found["engines"] and found["gates_not_proven"] == 0
    assert found["ci"]["kl"][0] < found["kl"] < found["ci"]["kl"][1]


def test_terminal_table_says_that_gates_are_not_proven() -> None:
    statuses = [row[2] for row in make_run_table(make_runs()).rows]
    assert statuses == ["accepted", "rejected", "accepted, 1 not proven", "accepted"]
