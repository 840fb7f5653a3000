"""The six lines at the end of a build: what they say, and that they fit 80 columns."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.report_example import FIDELITY
from support.report_variants import GATES, make_empty_report, make_example, render_to_text

from quantkit.artifact.fidelity_schema import BenchmarkResult, Fidelity
from quantkit.recipe.schema import Gate
from quantkit.report import gates
from quantkit.report.short_form import choose_wording, make_short_form, word_benchmarks
from quantkit.report.terminal import render_results

ARTIFACT = Path("artifacts/tiny-v3-awq4")
PASSED = {"task": "gsm8k", "n": 300, "source": 0.823, "artifact": 0.82, "verdict": "pass"}


def show(report: Fidelity, width: int = 80) -> dict[str, str]:
    """Return label -> text of the lines; a line that wraps is joined, warnings are numbered."""
    lines: dict[str, str] = {}
    label = ""
    for line in render_to_text(make_short_form(report, ARTIFACT), width).splitlines():
        assert len(line) <= width
        if line[:1] != " ":
            label, _, text = line.partition(" ")
            label = f"{label}{sum(key.startswith(label) for key in lines) or ''}"
            lines[label] = text.strip()
        else:
            lines[label] += f" {line.strip()}"
    return lines


def test_six_lines_in_their_order_with_their_figures() -> None:
    lines = show(gates.apply_gates(GATES, make_example()), 120)
    warnings = [label for label in lines if label.startswith("warning")]
    order = ["verdict", "size", "KL", "benchmarks", *warnings, "page", "next"]
    assert list(lines) == order
    assert lines["verdict"] == "Rejected: it fails 2 of the 8 gates of its recipe."
    assert lines["size"].startswith("1.22x smaller, 6.41 MB from 7.80 MB; 7.03 bits per weight")
    assert lines["KL"] == "worst kind 450 (math), mean 361 [319, 403], 10⁻⁶ nats/token"
    assert lines["benchmarks"].startswith("tiny-v3-math 82.0 % from 82.3 % (not resolved); ")
    assert lines["page"] == "artifacts/tiny-v3-awq4/quantkit/fidelity.html"
    assert lines["next"] == "quantkit report artifacts/tiny-v3-awq4 --full"


def test_mean_is_compared_with_the_yardstick_if_there_is_one() -> None:
    row = {
        "domain": "all",
        "tokens": 10_240,
        "kl_mean": {"value": 0.0012},
        "ratio": {"value": 0.3, "ci": [0.24, 0.41]},
        "typical": {"value": 0.2},
    }
    report = make_example({"yardstick": {"top1": {"value": 0.99}, "rows": [row]}})
    assert show(report, 120)["KL"] == (
        "worst kind 450 (math), mean 361 [319, 403] (0.30x [0.24, 0.41] of RTN), 10⁻⁶ nats/token"
    )
    assert show(report)["KL"] == "worst kind 450 (math), mean 361 (0.30x of RTN), 10⁻⁶ nats/token"


def test_next_command_depends_on_gates_and_engines() -> None:
    for bounds, changes, command in (
        ({"kl_max": Gate(max=1)}, {}, "quantkit serve artifacts/tiny-v3-awq4"),
        ({}, {}, "quantkit serve artifacts/tiny-v3-awq4"),
        ({}, {"serving": []}, "quantkit verify artifacts/tiny-v3-awq4 --deep"),
        ({"kl_max": Gate(max=0.1)}, {}, "quantkit report artifacts/tiny-v3-awq4 --full"),
        ({"absent": Gate(min_score=0.1)}, {}, "quantkit report artifacts/tiny-v3-awq4 --full"),
    ):
        artifact = {**dict(FIDELITY["artifact"]), **changes}  # type: ignore[call-overload]
        report = gates.apply_gates(bounds, make_example({"artifact": artifact}))
        assert show(report)["next"] == command


def test_warnings_that_matter_have_a_line_each() -> None:
    lines = show(make_example())
    assert lines["warning"] == "1 module with a fallback: shared-gram 1"
    assert (
        lines["warning1"] == "narrow calibration: 2 kinds of text (code, math) in 1 language (en)"
    )
    assert "2 kinds of text in 1 language" in show(make_example(), 76)["warning1"]
    artifact: dict[str, Any] = {**dict(FIDELITY["artifact"]), "bytes_artifact": 9_000_000}  # type: ignore[call-overload]
    calibration: dict[str, Any] = {
        **dict(FIDELITY["calibration"]),  # type: ignore[call-overload]
        "kinds": {"web": 1, "math": 1, "code": 1, "web-zh": 1},
        "overlaps": [
            {"task": "gsm8k", "items": 300, "overlapping": 11},
            {"task": "mbpp", "items": 300, "overlapping": 0},
        ],
    }
    changes = {"artifact": artifact, "calibration": calibration, "fallbacks": []}
    lines = show(make_example(changes))
    warnings = [text for label, text in lines.items() if label.startswith("warning")]
    assert warnings == [
        "the artifact has 115% of the source's size",
        "gsm8k: 11 of 300 prompts are in the calibration text",
    ]
    assert lines["size"].startswith("1.15x larger")


def test_unmeasured_report_says_so() -> None:
    lines = show(make_empty_report())
    assert lines["verdict"] == "Not judged: no gates."
    assert lines["KL"] == "not measured"
    assert lines["benchmarks"] == "none in the recipe"


def test_benchmarks_get_shorter_without_losing_a_verdict() -> None:
    rows = [BenchmarkResult.model_validate({**PASSED, "task": f"task{n}"}) for n in range(9)]
    rows.append(
        BenchmarkResult.model_validate({
            **PASSED,
            "verdict": "not resolved (n = 100, detectable 2.8 pp)",
            "recovery": {"value": 0.952},
        })
    )
    long, scores, counts = word_benchmarks(rows)
    assert "task0 82.0 % from 82.3 % (pass)" in long and "gsm8k 82.0 % (not resolved)" in scores
    assert counts == "9 pass, 1 not resolved; lowest recovery 95.2 % (gsm8k)"
    absent = BenchmarkResult(task="humaneval", status="not run", reason="no sandbox")
    assert word_benchmarks([absent]) == ("humaneval not run: no sandbox", "1 not run")


def test_task_that_is_not_valid_is_named_and_warned_of() -> None:
    row = {**PASSED, "fault": "gsm8k: 40 % of the answers are cut"}
    lines = show(make_example({"benchmarks": [row]}))
    assert lines["benchmarks"] == "gsm8k 82.0 % from 82.3 % (not valid)"
    assert "not valid: gsm8k: 40 % of the answers are cut" in lines.values()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_word_is_broken(width: int) -> None:
    report = gates.apply_gates(GATES, make_example())
    text = render_to_text(make_short_form(report, ARTIFACT), width)
    words = {
        word
        for line in make_short_form(report, ARTIFACT).lines
        for wording in line.wordings
        for word in wording.split()
    }
    assert {word for line in text.splitlines() for word in line[12:].split()} <= words


def test_the_most_complete_wording_that_fits_is_chosen() -> None:
    wordings = ("the longest of them", "a shorter one", "short")
    assert [choose_wording(wordings, room) for room in (40, 19, 18, 5, 2)] == [
        *wordings[:1] * 2,
        "a shorter one",
        "short",
        "short",
    ]


def test_long_paths_and_commands_stay_whole() -> None:
    folder = Path("artifacts") / "/".join(["a-very-long-folder"] * 8)
    text = io.StringIO()
    console = Console(file=text, width=60, color_system=None)
    console.print(make_short_form(make_example(), folder), crop=False)
    lines = text.getvalue().splitlines()
    assert lines[-2:] == [
        f"page        {folder}/quantkit/fidelity.html",
        f"next        quantkit serve {folder}",
    ]


def test_untrusted_names_reach_the_terminal_without_control_characters() -> None:
    rows = [{**PASSED, "task": "\x1b[2Jgsm8k"}]
    form = make_short_form(make_example({"benchmarks": rows}), Path("a\x1b[31m b"))
    text = render_to_text(form, 120)
    assert "\x1b" not in text and "[2Jgsm8k" in text
    assert "quantkit report 'a [31m b'" in text or "quantkit serve 'a [31m b'" in text


def test_several_formats_have_a_title_each_and_tables_once() -> None:
    report = make_example()
    results = [(Path("artifacts/a"), report), (Path("artifacts/b"), report)]
    short = render_to_text(render_results(results, full=False))
    assert short.splitlines()[0] == "artifacts/a" and "\nartifacts/b\n" in short
    assert "artifacts/a" not in render_to_text(render_results(results[:1], full=False)).split()[0]
    full = render_to_text(render_results(results, full=True))
    assert full.count("Next-token distributions") == 1 and full.count("\nverdict ") == 2
