"""quantkit/fidelity.html in Chromium: plots, sorting, search, color schemes, print, hostile
text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from support.browser_pages import COLORS, NARROW, Tab, contrast, luminance
from support.constants import CHROMIUM
from support.report_large import make_large_report
from support.report_pages import (
    HOSTILE,
    make_hostile_report,
    make_judged_example,
    write_artifact_folder,
)

from quantkit.report import html_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
    ),
]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of DeepSeek-V3's size with 300 changed items."""
    folder = write_artifact_folder(tmp_path_factory.mktemp("page"), make_large_report(), items=900)
    (folder / "page.html").write_text(html_page.make_page(folder), encoding="utf-8")
    return folder / "page.html"


@pytest.fixture
def tab(browser: Any, page_file: Path) -> Iterator[Tab]:
    opened = Tab(browser, page_file)
    yield opened
    assert opened.faults == []
    opened.context.close()


# -------------------------------------------------------------------------------------------- plots


def test_every_plot_is_drawn(tab: Tab) -> None:
    names = tab.all(
        "[...document.querySelectorAll('figure[data-plot]:has(svg)')].map(f => f.dataset.plot)"
    )
    assert names == ["layers", "blocks", "kl", "experts", "bits"]
    cells = "document.querySelectorAll('figure[data-plot=experts] .mark-rect path').length"
    assert tab.all(cells) >= 58 * 256
    crosses = tab.all(
        "document.querySelectorAll('figure[data-plot=experts] .mark-symbol.role-mark path').length"
    )
    assert crosses == len(make_large_report().experts.list_uncalibrated())  # type: ignore[union-attr]
    red = tab.all("[...document.querySelectorAll('figure[data-plot=experts] .mark-rect path')]"
                  ".filter(p => p.getAttribute('fill') === 'var(--under)').length")  # fmt: skip
    assert red == crosses


def test_plot_shows_a_tooltip(tab: Tab) -> None:
    tab.page.locator("figure[data-plot=bits] .mark-rect path").first.hover()
    tip = tab.page.locator("#vg-tooltip-element.visible")
    tip.wait_for(timeout=10_000)
    assert (
        "rules[0]: awq+gptq int4 g128 asymmetric" in tip.inner_text()
        and "44,544" in tip.inner_text()
    )


# -------------------------------------------------------------------------- tables, search, buttons


def test_tables_sort_both_ways(tab: Tab) -> None:
    head = tab.page.locator("#t-modules thead button")
    rows = len(tab.column("t-modules", 0))
    assert rows == html_page.WORST
    for column, read in (
        (2, lambda t: float(t.split()[0])),
        (5, lambda t: int(t.replace(",", ""))),
    ):
        for backwards in (True, False):  # numbers: the largest first
            head.nth(column).click()
            shown = [read(text) for text in tab.column("t-modules", column)]
            assert shown == sorted(shown, reverse=backwards) and len(shown) == rows
    head.nth(0).click()
    layers = [int(name.split(".")[2]) for name in tab.column("t-modules", 0)]
    assert layers == sorted(layers)  # 9 before 10
    assert tab.page.locator("#t-modules th[aria-sort]").count() == 1


def test_cells_without_a_number_sort_last(tab: Tab) -> None:
    for _ in range(2):
        tab.page.locator("#t-distribution thead button").nth(2).click()
        assert tab.column("t-distribution", 2)[-1] == "-"
    tab.page.locator("#t-benchmarks thead button").nth(1).click()
    assert tab.column("t-benchmarks", 1)[-1] == "-"


def test_modules_are_filtered(tab: Tab) -> None:
    names = tab.column("t-modules", 0)
    tab.page.fill("[data-filters=t-modules]", "DOWN layers.5")
    shown = tab.column("t-modules", 0)
    assert shown == [name for name in names if "down" in name and "layers.5" in name]
    assert 0 < len(shown) < len(names)
    assert tab.page.locator("output[for=t-modules]").inner_text() == f"{len(shown)} of {len(names)}"
    tab.page.fill("[data-filters=t-modules]", "")
    assert tab.column("t-modules", 0) == names


def test_changed_items_are_searched(tab: Tab) -> None:
    assert tab.articles() == [("mgsm_zh", "lost")] * 12  # regressions first, a page of them
    output = tab.page.locator("output[for=search]")
    tab.page.select_option("#outcome", "gained")
    assert tab.articles() == [("gsm8k", "gained")] * 12 and output.inner_text() == "150 of 300"
    tab.page.select_option("#outcome", "")
    tab.page.select_option("#task", "gsm8k")
    assert output.inner_text() == "150 of 300"
    tab.page.select_option("#task", "")
    tab.page.fill("#search", "what is 891?")  # an item that is not on the first page
    assert tab.articles() == [("gsm8k", "gained")] and output.inner_text() == "1 of 300"
    marks = tab.page.locator("#items article:not([hidden]) mark").all_inner_texts()
    assert marks == ["892", "891"]
    tab.page.fill("#search", "no such words")
    assert tab.articles() == [] and output.inner_text() == "0 of 300"
    tab.page.fill("#search", "")
    more = tab.page.locator("#more")
    assert more.inner_text() == "Show 12 more of 288"
    more.click()
    assert len(tab.articles()) == 24


def test_commands_are_copied_or_selected(tab: Tab) -> None:
    tab.page.locator("button.copy").first.click()
    tab.page.locator("button.copy", has_text=re.compile("Copied|Selected")).wait_for(timeout=1_400)


# --------------------------------------------------------------------- dark, narrow, printed, plain


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_color_schemes(
    scheme: str, browser: Any, page_file: Path
) -> None:
    tab = Tab(browser, page_file, color_scheme=scheme)
    page = tab.all("getComputedStyle(document.documentElement).backgroundColor")
    assert (luminance(page) > 0.5) == (scheme == "light")
    selectors = [
        "body",
        ".note",
        ".lead",
        ".verdict",
        "td .tone.good",
        "td .tone.bad",
        "td .tone.open",
        "mark",
        ".same",
        "nav a",
        "thead button",
        ".answer pre",
        "summary",
        ".plot svg text",
    ]
    colors = tab.page.evaluate(COLORS, selectors)
    weak = {
        name: round(contrast(front, back), 2)
        for name, front, back in colors
        if contrast(front, back) < 4.5
    }
    assert weak == {} and len(colors) == 14
    tab.page.click("#theme")
    turned = tab.all("getComputedStyle(document.documentElement).backgroundColor")
    assert (luminance(turned) > 0.5) == (scheme == "dark")
    assert tab.faults == []
    tab.context.close()


def test_narrow_page_scrolls_only_vertically(browser: Any, page_file: Path) -> None:
    tab = Tab(browser, page_file, viewport=NARROW, is_mobile=True, has_touch=True)
    assert tab.all("document.documentElement.scrollWidth") == NARROW["width"]
    sides = tab.all(
        "[...document.querySelector('.sides').children].map(e => e.getBoundingClientRect().left)"
    )
    assert len(set(sides)) == 1  # below each other
    kept = tab.all("""(() => { const table = document.querySelector('#t-benchmarks');
        const box = table.closest('.scroll');
        box.scrollLeft = box.scrollWidth;
        return [box.scrollLeft, table.querySelector('tbody th').getBoundingClientRect().left,
                table.querySelector('tbody td:last-child').getBoundingClientRect().right,
                getComputedStyle(box).backgroundImage.includes('gradient')]; })()""")
    assert (
        kept[0] > 0 and kept[1] >= -16 and kept[2] <= NARROW["width"]
    )  # task and verdict are visible
    assert kept[3], "a shadow marks the overflow"
    assert tab.faults == []
    tab.context.close()


def test_print_is_white_without_controls(browser: Any, page_file: Path, tmp_path: Path) -> None:
    tab = Tab(browser, page_file, color_scheme="dark")
    tab.page.emulate_media(media="print", color_scheme="dark")
    assert (
        tab.all("getComputedStyle(document.documentElement).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert luminance(tab.all("getComputedStyle(document.body).color")) < 0.1
    for name in ("nav", ".tools", ".copy"):
        assert not tab.page.locator(name).first.is_visible()
    closed = tab.all("""[...document.querySelectorAll('details:not([open])')].map(
        each => each.lastElementChild.checkVisibility({contentVisibilityAuto: true}))""")
    assert closed and all(closed), "collapsed parts are printed"
    assert "288 more items are not printed." in tab.page.locator("#left").inner_text()
    tab.page.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)
    pages = (tmp_path / "page.pdf").read_bytes().count(b"/Type /Page\n")
    assert 8 <= pages <= 30
    tab.context.close()


def test_page_without_scripts_shows_tables_and_answers(browser: Any, page_file: Path) -> None:
    tab = Tab(browser, page_file, java_script_enabled=False)
    assert tab.page.locator("#t-modules tbody tr").count() == html_page.WORST
    assert tab.page.locator("#items > article").last.is_visible()
    tab.context.close()


# ------------------------------------------------------------------------------------------ hostile


def test_hostile_text_runs_no_script(browser: Any, tmp_path: Path) -> None:
    """Drawn, hovered, sorted and searched: no script of the text's runs, nothing is fetched,
    the page stays whole."""
    text = " ".join(HOSTILE).encode("utf-8", "ignore").decode()
    fidelity, items = make_hostile_report(text, text * 2)
    artifact = write_artifact_folder(tmp_path, fidelity)
    (artifact / "quantkit/samples").mkdir()
    parquet.write_table(
        arrow.Table.from_pylist(items), artifact / "quantkit/samples/benchmarks.parquet"
    )
    (tmp_path / "page.html").write_text(html_page.make_page(artifact), encoding="utf-8")
    tab = Tab(browser, tmp_path / "page.html", viewport=NARROW)
    assert tab.all("document.documentElement.scrollWidth") == NARROW["width"]
    tab.page.locator("figure[data-plot=bits] .mark-rect path").first.hover()
    tab.page.locator("#vg-tooltip-element.visible").wait_for(timeout=10_000)
    tab.page.locator("#t-modules thead button").first.click()
    tab.page.fill("#search", "onerror")
    assert len(tab.articles()) == 4
    assert tab.all("typeof hacked") == "undefined"
    assert tab.all("document.querySelectorAll('img, iframe, article img, main script').length") == 0
    assert tab.faults == []
    tab.context.close()


def test_policy_blocks_an_injected_script(browser: Any, tmp_path: Path) -> None:
    """A script element that got into the page does not run either."""
    text = html_page.make_page(write_artifact_folder(tmp_path, make_judged_example()))
    (tmp_path / "page.html").write_text(
        text.replace("<h1>", "<script>hacked = 1</script><h1>"), encoding="utf-8"
    )
    tab = Tab(browser, tmp_path / "page.html")
    assert tab.all("typeof hacked") == "undefined"
    assert any("Content Security Policy" in fault for fault in tab.faults)
    tab.context.close()
