"""Model card and terminal tables of a report, with the same numbers in both."""

from __future__ import annotations

import json

import pytest
from ruamel.yaml import YAML
from support.paths import GOLDEN
from support.report_example import FIDELITY, PLAN
from support.report_variants import GATES, make_empty_report, make_example, render_to_text

from quantkit.artifact.fidelity_schema import (
    BenchmarkResult,
    DistributionResult,
    ExpertCoverage,
    Fidelity,
    Figure,
    ModuleResult,
)
from quantkit.figures import list_keys
from quantkit.plan.plan_schema import PlanSummary
from quantkit.recipe.schema import Gate
from quantkit.report import (
    card,
    format_numbers,
    gates,
    markdown,
    tables,
    terminal,
    terminal_plan,
    terminal_tables,
)
from quantkit.report.html_page import render_page
from quantkit.report.samples import read_samples
from quantkit.report.table import Table
from quantkit.report.verdict import format_verdict


def join_lines(text: str) -> str:
    """Return terminal text without whitespace, so that folded cells are whole."""
    return "".join(text.split())


# --------------------------------------------------------------------------------------------- text


def test_model_card_matches_golden_file() -> None:
    assert (
        card.render_card(gates.apply_gates(GATES, make_example()))
        == (GOLDEN / "card.md").read_text()
    )


def test_terminal_report_matches_golden_file() -> None:
    assert (
        render_to_text(terminal.render_report(gates.apply_gates(GATES, make_example())))
        == (GOLDEN / "fidelity.txt").read_text()
    )


def test_terminal_plan_matches_golden_file() -> None:
    assert (
        render_to_text(terminal_plan.render_plan(PlanSummary.model_validate(PLAN)))
        == (GOLDEN / "plan.txt").read_text()
    )


@pytest.mark.parametrize(("n_bytes", "share"), [(7_800_000, "100%"), (9_000_000, "115%")])
def test_artifact_that_saves_nothing_is_reported(n_bytes: int, share: str) -> None:
    artifact = {**dict(FIDELITY["artifact"]), "bytes_artifact": n_bytes}  # type: ignore[call-overload]
    report = make_example({"artifact": artifact})
    note = f"The artifact has {share} of the source's size; quantize more modules"
    assert note in card.render_card(report)
    assert join_lines(note) in join_lines(render_to_text(terminal.render_report(report)))
    assert "of the source's size" not in card.render_card(make_example())


def test_verdict_on_a_single_gate_is_singular() -> None:
    for bound, words in ((1.0, "it passes the gate of"), (1e-9, "it fails the gate of")):
        report = gates.apply_gates({"kl_mean": Gate(max=bound)}, make_example())
        assert words in format_verdict(report)


def test_every_view_says_that_gates_are_not_proven() -> None:
    """kl_mean is 0.000361 [0.000319, 0.000403], and keeps 0.0004 without proof."""
    bounds = {"kl_mean": Gate(max=0.0004), "kl_max": Gate(max=1)}
    for gate, sentence in (
        (bounds, "Accepted: it keeps all 2 gates of its recipe, 1 of them not proven."),
        (
            {"kl_mean": Gate(max=0.0004)},
            "Accepted: it keeps the gate of its recipe, which is not proven",
        ),
        (
            {**bounds, "top1": Gate(min=1)},
            "Rejected: it fails 1 of the 3 gates of its recipe, 1 other is not proven.",
        ),
        (
            {**bounds, "tiny-v3-code": Gate(min_recovery=0.98)},
            "Not judged: 1 of 3 gates have no figure, 1 other is not proven.",
        ),
    ):
        report = gates.apply_gates(gate, make_example())
        assert sentence in card.render_card(report)
        assert join_lines(sentence) in join_lines(render_to_text(terminal.render_report(report)))
        assert sentence in render_page(report, read_samples(GOLDEN, {}))
        assert "passes" not in format_verdict(report)
    proven = gates.apply_gates({"kl_max": Gate(max=1)}, make_example())
    assert format_verdict(proven) == "Accepted: it passes the gate of its recipe."


def test_card_and_terminal_show_the_same_cells() -> None:
    fidelity = gates.apply_gates(GATES, make_example())
    text, shown = (
        card.render_card(fidelity),
        join_lines(render_to_text(terminal.render_report(fidelity), width=250)),
    )
    for content in tables.make_tables(fidelity):
        for row in content.rows:
            for cell in row:
                assert markdown.escape_cell(cell) in text
                assert all(word in shown for word in cell.split())


def test_front_matter_is_yaml_with_license_and_base_model() -> None:
    source = {**dict(FIDELITY["source"]), "model": "deepseek-ai/DeepSeek-V3"}  # type: ignore[call-overload]
    source |= {"revision": "0" * 40, "languages": ["en", "no"]}
    source["license"] = {"id": "other", "name": 'dee"p: #seek', "link": "LICENSE-MODEL"}
    text = card.render_card(make_example({"source": source}))
    head = YAML(typ="safe", pure=True).load(text.split("---")[1])
    assert head.pop("model-index")
    assert head == {
        "language": ["en", "no"],
        "license": "other",
        "license_name": 'dee"p: #seek',
        "license_link": "LICENSE-MODEL",
        "base_model": "deepseek-ai/DeepSeek-V3",
        "base_model_relation": "quantized",
        "quantized_by": "quantkit",
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": ["awq", "4-bit", "quantkit"],
    }


def test_model_hub_parses_the_benchmarks_of_the_card() -> None:
    """By the hub's own parser, which knows `model-index` alone; tasks that were not run have no
    figure there."""
    from huggingface_hub import ModelCard

    rows = [*FIDELITY["benchmarks"], {"task": 'a "b": c', "metric": "m", "n": 3, "artifact": 0.5}]  # type: ignore[misc]
    result = {
        row.dataset_name: row
        for row in ModelCard(card.render_card(make_example({"benchmarks": rows}))).data.eval_results
    }
    scored = {row["task"]: row for row in rows if row.get("status", "ok") == "ok"}
    assert result.keys() == scored.keys()
    assert len(scored) < len(rows)
    for task, row in scored.items():
        assert (result[task].metric_value, result[task].metric_type) == (
            row["artifact"],
            row["metric"],
        )
        assert result[task].task_type == "text-generation"
    assert "model-index" not in card.render_card(make_empty_report())


def test_card_of_a_source_without_license_names_none() -> None:
    source = {**dict(FIDELITY["source"]), "license": None}  # type: ignore[call-overload]
    text = card.render_card(make_example({"source": source}))
    assert "license:" not in text
    assert "**License**: the source states none" in text


# ------------------------------------------------------------------------------------------ corners


def test_card_and_terminal_of_an_empty_report() -> None:
    text = card.render_card(make_empty_report())
    for sentence in (
        "No benchmark was run.",
        "Next-token distributions were not measured.",
        "None: the artifact is a copy",
    ):
        assert sentence in text
    assert "in the format" not in text and "per quantized weight" not in text  # there is none
    assert "**Verdict**: Not judged: no gates." in text
    assert "\n\n\n" not in text
    assert "No fallback was used." in text
    shown = render_to_text(terminal.render_report(make_empty_report()))
    assert shown.endswith("Not judged: no gates.\n")


def test_report_with_only_skipped_tasks() -> None:
    rows = [
        {"task": task, "status": "not run", "reason": "no sandbox"}
        for task in ("humaneval", "mbpp")
    ]
    fidelity = gates.apply_gates(
        {"mbpp": Gate(min_recovery=0.9)}, make_example({"benchmarks": rows})
    )
    assert "| humaneval | - | - | - | - | - | - | - | not run: no sandbox |" in card.render_card(
        fidelity
    )
    assert fidelity.status == "not judged"
    assert "Not judged: 1 of 1 gates have no figure." in render_to_text(
        terminal.render_report(fidelity)
    )


def test_worst_modules_come_first_and_others_are_counted() -> None:
    modules = [
        ModuleResult(
            name=f"m{i}",
            rule="r",
            method="awq",
            scheme="s",
            relative_error=0.1,
            output_relative_error=i / 1000,
        )
        for i in range(200)
    ]
    kept = [ModuleResult(name="kept", rule="r", method=None, scheme="BF16")]
    content = tables.make_module_table(make_example({"modules": [*modules, *kept]}))
    assert [row[0] for row in content.rows] == [f"m{199 - i}" for i in range(10)]
    assert content.note.startswith(
        "The 10 worst of 200; all in quantkit/fidelity.json. Weights: ||"
    )
    assert len(tables.make_module_table(make_example({"modules": modules}), limit=200).rows) == 200


def test_method_that_equals_its_rounding_is_named_once() -> None:
    pairs = (("gptq", "gptq"), ("awq", "gptq"), ("awq", "nearest"))
    modules = [
        ModuleResult(name="m", rule="r", method=method, rounding=rounding, scheme="s")
        for method, rounding in pairs
    ]
    values = [
        tables.make_module_table(make_example({"modules": [module]})).rows[0][1]
        for module in modules
    ]
    assert values == ["gptq", "awq+gptq", "awq+nearest"]


def test_card_with_long_names_stays_under_its_limit() -> None:
    long = "a|b<c`*\\ " * 400
    wide = gates.apply_gates(
        {f"task{i}": Gate(min_recovery=0.9) for i in range(300)},
        make_example({
            "benchmarks": [
                {"task": long, "n": 5, "verdict": long, "data_sha256": long} for _ in range(300)
            ],
            "distribution": [
                {"domain": long, "tokens": 3, "kl_mean": {"value": 0.1}} for _ in range(12)
            ],
            "fallbacks": [
                {"kind": long, "meaning": long, "modules": [long] * 500} for _ in range(200)
            ],
            "versions": {f"{long}{i}": long for i in range(200)},
            "command": long,
            "source": {
                **dict(FIDELITY["source"]),  # type: ignore[call-overload]
                "languages": [long] * 2000,
            },
            "artifact": {
                **dict(FIDELITY["artifact"]),  # type: ignore[call-overload]
                "name": long,
                "scheme": long,
                "notes": [long] * 200,
                "tags": [long] * 200,
                "serving": [{"engine": long, "command": long + "```"}] * 100,
            },
        }),
    )
    text = card.render_card(wide)
    assert len(text) < card.MAX_CHARACTERS
    assert "more rows in quantkit/fidelity.json." in text
    assert "<c" not in text.split("---\n", 2)[2].split("## Use")[0]


def test_untrusted_text_is_escaped_in_markdown_and_terminal() -> None:
    module = {
        "name": "a|b\n# x <script>",
        "rule": "r",
        "method": "awq",
        "scheme": "s",
        "relative_error": 0.5,
    }
    fidelity = make_example({"modules": [module]})
    assert "| a\\|b # x &lt;script> | awq |" in card.render_card(fidelity)
    hostile = make_example({"modules": [{**module, "name": "\x1b[2J[red]x[/red]"}]})
    shown = render_to_text(terminal.render_report(hostile))
    assert "\x1b" not in shown and "[2J[red]x[/red]" in shown


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_terminal_report_fits_its_width_without_loss(width: int) -> None:
    fidelity = gates.apply_gates(
        GATES,
        make_example({
            "distribution": [
                {
                    "domain": domain,
                    "tokens": 123_456,
                    "kl_mean": {"value": 0.000361, "se": 0.0000214},
                    "top1": {"value": 0.99, "se": 0.001},
                }
                for domain in ("all", "prose", "math", "code", "zh")
            ]
        }),
    )
    shown = render_to_text(terminal.render_report(fidelity), width)
    assert max(map(len, shown.splitlines())) <= width
    if width >= 100:
        for content in tables.make_tables(fidelity):
            for row in content.rows:
                for word in " ".join(row).split():
                    assert join_lines(word) in join_lines(shown), word


def test_columns_fit_every_number_and_word() -> None:
    content = Table(title="t", columns=("a", ">n"), rows=(("long words here " * 9, "1,234 ±5"),))
    assert terminal_tables.compute_widths(content, 100) == [89, 8]
    assert terminal_tables.compute_widths(content, 60) == [49, 8]
    crowded = Table(title="t", columns=(">a", ">b"), rows=(("1" * 60, "2" * 60),))
    assert terminal_tables.compute_widths(crowded, 100) is None


def test_narrow_terminal_breaks_no_number() -> None:
    figures = ("1,234,567", "23,456", "107.87 GB", "345.68 GB ±0.01")
    columns = ("what", *(f">{word} of tokens" for word in ("sum", "rest", "bytes", "all")))
    content = Table(title="t", columns=columns, rows=(("a long name of several words", *figures),))
    for width in (100, 80, 60, 55):
        shown = render_to_text(terminal.render_table(content), width)
        assert max(map(len, shown.splitlines())) <= width
        for word in " ".join(figures).split():
            assert word in shown.split(), (width, word)
    assert "sum of tokens" in render_to_text(terminal.render_table(content), 100)
    assert "345.68 GB ±0.01" in render_to_text(terminal.render_table(content), 60)


# -------------------------------------------------------------------------------------------- gates


def test_judge_gates_returns_a_result_per_bound() -> None:
    results = gates.judge_gates(GATES, make_example())
    assert [(row.figure, row.bound, row.value, row.ok) for row in results] == [
        ("kl_mean", "<= 0.0003", 0.000361, False),
        ("kl_max", "<= 1", 0.31, True),
        ("top1", "<= 1", 0.9953, True),
        ("top1", ">= 0.99", 0.9953, True),
        ("tiny-v3-math.recovery", ">= 0.98", 0.9964, True),
        ("tiny-v3-code.recovery", ">= 0.98", None, None),
        ("router_agreement", ">= 0.99", 0.9876, False),
        ("experts_uncalibrated", "<= 4", 1.0, True),
    ]
    assert results[5].reason == "not run: no sandbox: install bubblewrap"


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, "not judged"),
        ({"kl_mean": Gate(max=1)}, "accepted"),
        ({"kl_mean": Gate(max=1), "tiny-v3-code": Gate(min_recovery=0.9)}, "not judged"),
        ({"kl_mean": Gate(max=0), "tiny-v3-code": Gate(min_recovery=0.9)}, "rejected"),
    ],
)
def test_status_follows_from_the_gates(bounds: dict[str, Gate], expected: str) -> None:
    assert gates.apply_gates(bounds, make_example()).status == expected


def test_non_finite_numbers_become_none() -> None:
    result = Figure.model_validate({"value": "nan", "se": float("inf"), "ci": ["-Infinity", 0]})
    assert (result.value, result.se, result.ci) == (None, None, (None, 0.0))


def test_non_finite_figure_fails_every_bound() -> None:
    pooled = DistributionResult(domain="all", tokens=1, kl_mean=Figure(value=float("nan")))
    fidelity = make_example({"distribution": [pooled]})
    (result,) = gates.judge_gates({"kl_mean": Gate(max=1)}, fidelity)
    assert (result.ok, result.value, result.reason) == (False, None, "not finite")
    (result,) = gates.judge_gates(
        {"router_agreement": Gate(min=0)},
        make_example({"routers": [{"block": "b", "agreement": None}]}),
    )
    assert result.ok is False


@pytest.mark.parametrize(
    "figure", sorted({*list_keys()} - {"fallbacks", "bits_overall", "bits_per_weight", "size"})
)
def test_unmeasured_figure_is_not_judged(figure: str) -> None:
    (result,) = gates.judge_gates({figure: Gate(max=1)}, make_empty_report())
    assert (result.ok, result.reason) == (None, "not measured")


def test_source_score_of_zero_is_not_judged() -> None:
    floor = make_example({"benchmarks": [BenchmarkResult(task="t", n=9, source=0.0, artifact=0.0)]})
    (result,) = gates.judge_gates({"t": Gate(min_recovery=0.5)}, floor)
    assert (result.ok, result.reason) == (None, "the source scores 0: no information")
    (result,) = gates.judge_gates({"other": Gate(min_recovery=0.5)}, floor)
    assert (result.ok, result.reason) == (None, "not run")


# ------------------------------------------------------------------------------------------- values


def test_fidelity_json_is_stable_and_reads_back() -> None:
    fidelity = gates.apply_gates(GATES, make_example())
    text = fidelity.to_json()
    assert text == Fidelity.model_validate(json.loads(text)).to_json()
    assert Fidelity.model_validate_json(text) == fidelity
    assert (
        json.loads(text)["distribution"][1]["kl_max"]["value"] is None
    )  # infinity, which JSON cannot say


def test_unknown_key_is_rejected() -> None:
    with pytest.raises(ValueError, match="extra"):
        make_example({"speed": 3})


def test_experts_below_the_minimum_are_listed() -> None:
    experts = ExpertCoverage.model_validate({
        "min_tokens": 10,
        "policy": "rtn",
        "layers": [{"block": "b", "tokens": [10, 9, 0]}],
    })
    assert experts.list_uncalibrated() == [("b", 1, 9), ("b", 2, 0)]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_numbers.format_size(999), "999 B"),
        (format_numbers.format_size(5_000_000_000), "5.00 GB"),
        (format_numbers.format_size(1_342_000_000_000), "1.34 TB"),
        (format_numbers.format_parameters(671_026_404_352), "671.03 B"),
        (format_numbers.format_digits(0.0), "0"),
        (format_numbers.format_digits(3.0), "3"),
        (format_numbers.format_digits(0.000361), "0.000361"),
        (format_numbers.format_digits(0.0000012), "1.20e-06"),
        (format_numbers.format_digits(12.3456), "12.3"),
        (format_numbers.format_digits(1234.6), "1235"),
        (format_numbers.format_digits(None), "-"),
        (format_numbers.format_probability(0.0004), "<0.001"),
        (
            format_numbers.format_points(Figure(value=-0.91, ci=(-1.97, 0.08))),
            "-0.91 [-1.97, +0.08]",
        ),
        (format_numbers.format_points(Figure(value=0.5)), "+0.50"),
        (format_numbers.format_figure(Figure(value=0.0, se=0.0), "nats"), "0"),
        (
            format_numbers.format_figure(Figure(value=0.000361, ci=(0.000319, 0.0004)), "nats"),
            "0.000361 [0.000319, 0.000400]",
        ),
        (
            format_numbers.format_figure(Figure(value=9.14e-5, ci=(8.26e-5, 1e-4)), "nats", -6),
            "91.4 [82.6, 100.0]",
        ),
        (
            format_numbers.format_figure(Figure(value=0.03, ci=(0.021, None)), "nats"),
            "0.0300 [0.0210, ∞]",
        ),
        (format_numbers.format_factors(Figure(value=8.564, ci=(3.1, 23.7))), "8.6x [3.1, 23.7]"),
        (
            format_numbers.format_factors(Figure(value=1.0032, ci=(0.99, 1.02))),
            "1.0032x [0.9900, 1.0200]",
        ),
        (format_numbers.format_factors(Figure(value=0.012)), "0.012x"),
        (format_numbers.format_figure(None, "ratio"), "-"),
        (format_numbers.format_figure(Figure(value=float("inf")), "ratio"), "not finite"),
        (
            format_numbers.format_figure(
                Figure(value=-0.00031, ci=(-0.00035, -0.00027)), "signed percent"
            ),
            "-0.031 % [-0.035, -0.027]",
        ),
    ],
)
def test_numbers_are_formatted(shown: str, expected: str) -> None:
    assert shown == expected
