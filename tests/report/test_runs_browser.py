"""The page of `quantkit runs --html` in Chromium: plot, narrow and dark screens, hostile text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.browser_pages import COLORS, NARROW, Tab, contrast
from support.constants import CHROMIUM
from support.report_pages import HOSTILE
from support.runs_example import make_run, make_runs

from quantkit.report import runs_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
    ),
]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "runs.html"
    file.write_text(runs_page.render_page(make_runs(), "artifacts"), encoding="utf-8")
    return file


def test_every_artifact_is_a_point_with_a_tooltip(browser: Any, page_file: Path) -> None:
    tab = Tab(browser, page_file)
    points = tab.page.locator("figure[data-plot=front0] .mark-symbol.role-mark path")
    assert points.count() == 4
    points.first.hover()
    tab.page.locator("#vg-tooltip-element.visible").wait_for(timeout=10_000)
    words = tab.page.locator("#vg-tooltip-element").inner_text()
    assert "vLLM, quantkit.load" in words and "KL [nats/token]" in words
    assert tab.faults == []
    tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str, browser: Any, page_file: Path) -> None:
    tab = Tab(browser, page_file, color_scheme=scheme)
    selectors = ["body", ".note", "td .tone.good", "td .tone.bad", "td .tone.open"]
    colors = tab.page.evaluate(COLORS, [*selectors, "thead button", ".plot svg text"])
    weak = [name for name, front, back in colors if contrast(front, back) < 4.5]
    assert weak == [] and tab.faults == []
    tab.context.close()


def test_narrow_page_scrolls_only_vertically(browser: Any, page_file: Path) -> None:
    tab = Tab(browser, page_file, viewport=NARROW, is_mobile=True, has_touch=True)
    assert tab.all("document.documentElement.scrollWidth") == NARROW["width"]
    tab.context.close()


def test_hostile_text_runs_no_script(browser: Any, tmp_path: Path) -> None:
    text = " ".join(HOSTILE).encode("utf-8", "ignore").decode()
    page = runs_page.render_page([make_run(text, 5_000_000, 0.001, format_name=text)], text)
    (tmp_path / "runs.html").write_text(page, encoding="utf-8")
    tab = Tab(browser, tmp_path / "runs.html")
    tab.page.locator("figure[data-plot=front0] .mark-symbol.role-mark path").first.hover()
    tab.page.locator("#vg-tooltip-element.visible").wait_for(timeout=10_000)
    assert tab.all("typeof hacked") == "undefined"
    assert tab.all("document.querySelectorAll('img, iframe, main script').length") == 0
    assert tab.faults == []
    tab.context.close()
