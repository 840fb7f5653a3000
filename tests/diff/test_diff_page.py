"""The page of a comparison: its text, and its behavior in Chromium."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
from support.browser_pages import COLORS, NARROW, Tab, contrast, luminance
from support.constants import CHROMIUM
from support.diff_example import make_answer, make_items, make_side_a, make_side_b
from support.report_large import make_large_report
from support.report_pages import HOSTILE, LIMIT_BYTES, Page

from quantkit.diff import page, tables
from quantkit.diff.charts import compute_layer_medians, compute_tail
from quantkit.diff.compare import compare_sides
from quantkit.diff.diff_schema import ErrorShift
from quantkit.diff.headline import format_headline
from quantkit.diff.sides import Side
from quantkit.report.html_page import compute_csp_hash

in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
    ),
]


def render_sides(a: Side, b: Side) -> str:
    """Return the page of B compared with A."""
    return page.render_page(compare_sides(a, b), a.tokens, b.tokens)


@pytest.fixture(scope="module")
def text() -> str:
    """The page of the example."""
    return render_sides(make_side_a(), make_side_b())


@pytest.fixture(scope="module")
def big_sides() -> tuple[Side, Side]:
    """Two of DeepSeek-V3's size, 200 of 600 items flipped."""
    one = make_large_report().model_copy(update={"benchmarks": ()})
    modules = [
        m.model_copy(update={"output_relative_error": 0.01}) if m.method else m for m in one.modules
    ]
    sides = [
        Side(name=name, kind="artifact", fidelity=fidelity, items=make_items(scores, [1.0] * 600))
        for name, fidelity, scores in (
            ("a", one, [1.0] * 600),
            (
                "b",
                one.model_copy(update={"modules": tuple(modules)}),
                [float(n % 3 > 0) for n in range(600)],
            ),
        )
    ]
    return sides[0], sides[1]


# --------------------------------------------------------------------------------------------- text


def test_page_shows_the_cells_of_every_table(text: str) -> None:
    words, diff = Page(text).words, compare_sides(make_side_a(), make_side_b())
    shown = [
        table for table in tables.make_tables(diff, page.ROWS) if table.title != "Flipped items"
    ]
    assert len(shown) == 15
    for table in shown:
        for row in table.rows:
            assert all(cell in words for cell in row if cell), (table.title, row)


def test_sections_are_linked_and_lost_items_come_first(text: str) -> None:
    assert re.findall(r'<section id="(\w+)"', text) == re.findall(r'<li><a href="#(\w+)"', text)
    assert re.findall(r'data-outcome="(\w+)"', text) == ["lost"] * 12
    assert (
        format_headline(compare_sides(make_side_a(), make_side_b())).replace("->", "-&gt;") in text
    )


def test_policy_names_the_two_scripts(text: str) -> None:
    """As in the report, nothing is fetched and no other script runs."""
    result = Page(text)
    policy = next(
        value for name, value in result.values if name == "content" and "default-src" in value
    )
    assert policy.startswith("default-src 'none';") and len(result.scripts) == 3
    for script in result.scripts[1:]:
        assert f"'{compute_csp_hash(script)}'" in policy
    links = [value for name, value in result.values if name in ("href", "src")]
    assert links and all(value.startswith("#") for value in links)
    assert list(result.drawings["specs"]) == ["layers", "blocks", "kl"]


def test_page_is_reproducible(text: str) -> None:
    assert render_sides(make_side_a(), make_side_b()) == text


def test_page_of_a_large_pair_stays_small(big_sides: tuple[Side, Side]) -> None:
    content = render_sides(*big_sides)
    assert len(content.encode()) < LIMIT_BYTES
    assert content.count("<article") == 200 and "44,344 more; all in --json" in content


def test_page_escapes_hostile_text() -> None:
    clean = Page(render_sides(*make_named_sides("plain")))
    for hostile in HOSTILE:
        result = Page(render_sides(*make_named_sides(hostile)))
        assert result.tags == clean.tags, hostile
        assert len(result.scripts) == 3


def make_named_sides(word: str) -> tuple[Side, Side]:
    """Return two sides with `text` wherever untrusted text can be."""
    sides = []
    for side in (make_side_a(), make_side_b()):
        held = {
            key: replace(
                item, prompt=word, target=word[:99], answer=make_answer(f"{word}{n}", float(n))
            )
            for key, item in make_items([1.0] * 3, [1.0] * 3).items()
            for n in [(key[2] + (side.kind == "artifact" and side.name == "second")) % 2]
        }
        tensors = {f"{word}{n}": ("BF16", (n, 2 if side.name == "first" else 3)) for n in range(2)}
        sides.append(
            replace(
                side,
                name=word or "x",
                items=held,
                tensors=tensors,
                recipe={"key": f"{word} {side.name}"},
            )
        )
    return sides[0], sides[1]


# -------------------------------------------------------------------------------------------- plots


def test_tail_counts_tokens_at_or_above_each_step() -> None:
    kl = [1e-12, 1e-5, 1e-5, 3e-3, float("inf")]
    rows = {row["at"]: (row["share"], row["tokens"]) for row in compute_tail(kl, "A")}
    assert (rows[-9.0], rows[-5.25], rows[-4.75], rows[-2.75]) == (
        (0.75, 3),
        (0.75, 3),
        (0.25, 1),
        (0.25, 1),
    )
    assert max(rows) == -2.75 and compute_tail([], "A") == []


def test_layer_medians_of_both_sides() -> None:
    shifts = [
        ErrorShift(name=f"model.layers.{n}.up_proj", by="outputs", a=0.1, b=b, shift=None)
        for n, b in ((1, 0.3), (1, 0.5))
    ]
    result = {(row["layer"], row["side"]): row["error"] for row in compute_layer_medians(shifts)}
    assert result == {(1, "A"): 0.1, (1, "B"): 0.4}


def test_page_without_tokens_has_no_tail_plot() -> None:
    for a, there in ((replace(make_side_a(), tokens=None), False), (make_side_a(), True)):
        assert ("kl" in Page(render_sides(a, make_side_b())).drawings["specs"]) is there


# ------------------------------------------------------------------------------------------ browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """The example's page on disk."""
    path = tmp_path_factory.mktemp("diff") / "diff.html"
    path.write_text(text, encoding="utf-8")
    return path


class TestInABrowser:
    pytestmark = in_browser

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_page_draws_sorts_and_searches(
        self, scheme: str, browser: Any, page_file: Path
    ) -> None:
        tab = Tab(browser, page_file, color_scheme=scheme)
        names = tab.all(
            "[...document.querySelectorAll('figure[data-plot]:has(svg)')].map(f => f.dataset.plot)"
        )
        assert names == ["layers", "blocks", "kl"]
        tab.page.locator("#t-modules thead button").nth(4).click()
        assert tab.column("t-modules", 4) == ["+15.880", "+2.000", "-4.340"]
        tab.page.fill("[data-filters=t-modules]", "experts.1")
        assert tab.column("t-modules", 0) == ["model.layers.1.mlp.experts.1.gate_proj"]
        tab.page.fill("#search", "what is 33?")
        assert tab.articles() == [("tiny-v3-math", "lost")]
        assert tab.page.locator("#items article:not([hidden]) mark").all_inner_texts() == [
            "33",
            "34",
        ]
        tab.page.select_option("#outcome", "gained")
        assert tab.articles() == []
        assert tab.faults == []
        tab.context.close()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_has_contrast(self, scheme: str, browser: Any, page_file: Path) -> None:
        tab = Tab(browser, page_file, color_scheme=scheme)
        background = tab.all("getComputedStyle(document.documentElement).backgroundColor")
        assert (luminance(background) > 0.5) == (scheme == "light")
        selectors = [
            "body",
            ".note",
            ".lead",
            "td .tone.bad",
            ".models small",
            ".models .tone",
            "mark",
            "#t-distribution .tone.open",
            "thead button",
            "summary",
            ".plot svg text",
        ]
        colors = tab.page.evaluate(COLORS, selectors)
        weak = {
            name: round(contrast(front, back), 2)
            for name, front, back in colors
            if contrast(front, back) < 4.5
        }
        assert weak == {} and len(colors) == 11
        tab.context.close()

    def test_narrow_page_scrolls_only_vertically(
        self, browser: Any, page_file: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "long.html").write_text(
            render_sides(*make_named_sides("x" * 300)), encoding="utf-8"
        )
        for file in (page_file, tmp_path / "long.html"):
            tab = Tab(browser, file, viewport=NARROW, is_mobile=True, has_touch=True)
            assert tab.all("document.documentElement.scrollWidth") == NARROW["width"]
            overlapping = "[...document.querySelectorAll('#t-gates tbody th')]"
            overlapping += ".filter(cell => cell.scrollWidth > cell.clientWidth).length"
            assert tab.all(overlapping) == 0
            assert tab.faults == []
            tab.context.close()

    def test_hostile_text_runs_no_script(self, browser: Any, tmp_path: Path) -> None:
        hostile = " ".join(HOSTILE).encode("utf-8", "ignore").decode()
        (tmp_path / "page.html").write_text(
            render_sides(*make_named_sides(hostile)), encoding="utf-8"
        )
        tab = Tab(browser, tmp_path / "page.html")
        tab.page.fill("#search", "onerror")
        assert tab.all("typeof hacked") == "undefined"
        assert tab.all("document.querySelectorAll('img, iframe, main script').length") == 0
        assert tab.faults == []
        tab.context.close()

    def test_large_pair_is_drawn(
        self, browser: Any, tmp_path: Path, big_sides: tuple[Side, Side]
    ) -> None:
        (tmp_path / "page.html").write_text(render_sides(*big_sides), encoding="utf-8")
        tab = Tab(browser, tmp_path / "page.html")
        assert len(tab.column("t-modules", 0)) == page.ROWS and len(tab.articles()) == 12
        assert tab.faults == []
        tab.context.close()


def test_hostile_names_in_the_headline_are_escaped() -> None:
    content = render_sides(*make_named_sides("</main><b>"))
    assert escape("</main><b>") in content and "</main><b>" not in content
    assert json.dumps(Page(content).drawings)  # the data of the plots is whole
