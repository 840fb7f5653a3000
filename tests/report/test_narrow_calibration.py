"""A planted narrow calibration: the headline shows it, figures of the calibrated kind do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import ROOT

from quantkit.api import build
from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.figure_readers import list_kinds
from quantkit.figures import find_figure
from quantkit.report.card import render_card
from quantkit.report.notes import list_text_notes

PART = (
    "  - {{name: {0}, kind: {0}, licence: Apache-2.0, set: tiny-v3, domain: {0}, "
    "packing: documents, end: eos}}\n"
)


def build_report(folder: Path, *domains: str) -> Fidelity:
    """Return the report of tiny-v3 at 3 bits, calibrated on some of the domains of its corpus."""
    name = "-".join(domains)
    parts = "".join(map(PART.format, domains))
    (folder / f"{name}.yaml").write_text(f"version: 2\nname: {name}\nparts:\n{parts}")
    [result] = build(
        str(ROOT / "recipes" / "tiny-v3-gptq4.yaml"),
        overrides={
            "calibration.set": str(folder / f"{name}.yaml"),
            "calibration.sequences": "40",
            "calibration.length": "128",
            "fidelity.windows": "60",
            "quantize.bits": "3",
            "rules": "all-linear",
            "format": "dense",
            "gates": "{}",
            "evaluation.tasks": "[]",
            "output.path": str(folder / f"artifact-{name}"),
        },
    )
    return result.fidelity


def read_figure(report: Fidelity, key: str) -> float:
    figure = find_figure(key)
    value = figure.read(report).value if figure else None
    assert value is not None
    return value


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fidelity, Fidelity]:
    """Reports of a narrow and of a broad calibration with as many tokens."""
    folder = tmp_path_factory.mktemp("narrow")
    return build_report(folder, "math"), build_report(folder, "prose", "math", "code")


def test_headline_shows_a_narrow_calibration(reports: tuple[Fidelity, Fidelity]) -> None:
    """On its own kind the narrow one is the better; its worst kind loses several times as much."""
    narrow, broad = reports
    own, other = list_kinds(narrow)["math"].value, list_kinds(broad)["math"].value
    assert own is not None and other is not None and own < other
    for key in ("kl_worst_kind", "kl_mean_kinds"):
        assert read_figure(narrow, key) > 2 * read_figure(broad, key)
    assert read_figure(narrow, "shift") > 5


def test_report_and_card_say_narrow_calibration(reports: tuple[Fidelity, Fidelity]) -> None:
    narrow, broad = reports
    assert list_text_notes(narrow)[0].startswith("Narrow calibration: 1 kind of text (math)")
    assert "Narrow calibration: 1 kind of text" in render_card(narrow)
    assert any(note.startswith("Fidelity text: 0% is of kinds") for note in list_text_notes(broad))
