"""Pages in headless Chromium: sizes, colors and contrast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = """names => names.map(name => {
    let element = document.querySelector(name);
    const style = getComputedStyle(element), clear = 'rgba(0, 0, 0, 0)';
    const front = name.endsWith('text') ? style.fill : style.color;
    while (getComputedStyle(element).backgroundColor === clear) element = element.parentElement;
    return [name, front, getComputedStyle(element).backgroundColor];
})"""
"""Selector, color and background of the first element of each selector."""

WIDE, NARROW = {"width": 1360, "height": 900}, {"width": 360, "height": 740}


class Tab:
    """An open page with its console messages, errors, dialogs and network requests."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.faults: list[str] = []
        self.context = browser.new_context(**{
            "viewport": WIDE,
            "color_scheme": "light",
            "offline": True,
            **options,
        })
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.faults.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.faults.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.record_request(request.url))
        self.page.goto(file.as_uri())
        if options.get("java_script_enabled", True):
            self.page.wait_for_selector("html[data-drawn]", timeout=120_000)

    def record_request(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.faults.append(f"request: {url}")

    def all(self, script: str) -> Any:
        return self.page.evaluate(script)

    def column(self, table: str, number: int) -> list[str]:
        """Return the visible cells of a column."""
        result: list[str] = self.all(
            f"[...document.querySelectorAll('#{table} tbody tr:not([hidden])')].map(r => "
            f"r.cells[{number}].textContent)"
        )
        return result

    def articles(self) -> list[tuple[str, str]]:
        """Return (task, outcome) of the visible changed items."""
        shown = "[...document.querySelectorAll('#items > article:not([hidden])')]"
        return [
            (task, outcome)
            for task, outcome in self.all(f"{shown}.map(a => [a.dataset.task, a.dataset.outcome])")
        ]


def luminance(colour: str) -> float:
    """Return the relative luminance of "rgb(r, g, b)" as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Return the WCAG 2 contrast ratio."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
