"""quantkit/fidelity.html as text: content, order, escaping of hostile text, bytes and size."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as some
from support.report_large import make_item, make_large_report
from support.report_pages import (
    HOSTILE,
    LIMIT_BYTES,
    Page,
    make_hostile_report,
    make_judged_example,
    write_artifact_folder,
)
from support.report_variants import make_empty_report

from quantkit.artifact.fidelity_schema import ExpertCoverage, ModuleResult
from quantkit.artifact.layout import PAGE
from quantkit.cli.main import main
from quantkit.errors import ArtifactError
from quantkit.report import charts, html_page, tables
from quantkit.report.module_ranges import find_block_number, fold_names
from quantkit.report.samples import FLOOR, Answer, Samples, read_samples
from quantkit.verify.shallow import verify_artifact

ORDER = (
    "verdict",
    "artifact",
    "benchmarks",
    "distribution",
    "tokens",
    "plots",
    "modules",
    "fallbacks",
    "changed",
    "provenance",
)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a model of DeepSeek-V3's size with 300 changed items."""
    return html_page.make_page(
        write_artifact_folder(tmp_path_factory.mktemp("big"), make_large_report(), items=900)
    )


# ------------------------------------------------------------------------------------------ content


def test_page_has_its_sections_in_order(big: str) -> None:
    result = re.findall(r'<section id="(\w+)"', big)
    assert tuple(result) == ORDER
    linked = re.findall(r'<li><a href="#(\w+)"', big)
    assert tuple(linked) == ORDER
    assert "<noscript><p" in big


def test_page_shows_the_cells_of_the_card(tmp_path: Path) -> None:
    fidelity = make_judged_example()
    words = Page(html_page.make_page(write_artifact_folder(tmp_path, fidelity))).words
    for content in tables.make_tables(fidelity):
        for row in (
            content.rows
            if content.title not in {"Fallbacks", tables.make_block_table(fidelity).title}
            else ()
        ):
            assert all(cell in words for cell in row if cell), row


def test_page_head_has_verdict_and_tiles(big: str) -> None:
    words = Page(big).words
    assert "Rejected: it fails 1 of the 3 gates of its recipe." in words
    for figure in (
        "1.72x smaller",
        "400.89 GB from 688.57 GB",
        "overall; 4.25 of quantized",
        "0.000361",
        "1.0003",
        "99.53 %",
        "99.64 %",
    ):
        assert figure in words, figure


def test_page_of_an_empty_report_has_notes_instead_of_tables() -> None:
    text = html_page.render_page(make_empty_report(), Samples())
    for sentence in (
        "The recipe sets no gates.",
        "Nothing is quantized: the artifact is a copy of the source.",
        "No benchmark was run.",
        "Next-token distributions were not measured.",
        "No data for plots.",
        "No module was quantized.",
        "No fallback was used.",
        "No benchmark item was compared.",
    ):
        assert sentence in text
    assert tuple(re.findall(r'<section id="(\w+)"', text)) == ORDER
    assert Page(text).drawings["specs"] == {} and "<figure" not in text


def test_page_of_a_dense_model_has_no_expert_plot() -> None:
    text = html_page.render_page(
        make_judged_example({"experts": None, "routers": [], "distribution": [], "blocks": []}),
        Samples(),
    )
    assert list(Page(text).drawings["specs"]) == ["layers"]


def test_page_lists_every_module_of_a_fallback() -> None:
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
        for layer in (3, 4)
        for expert in range(250)
    ]
    rows = [{"kind": "shared-gram", "meaning": "m", "modules": names}]
    text = html_page.render_page(make_judged_example({"fallbacks": rows}), Samples())
    assert "<li>model.layers.{3-4}.mlp.experts.{0-249}.up_proj</li>" in text
    assert "<b>500</b> modules" in text


# ------------------------------------------------------------------------------------- hostile text


@pytest.mark.parametrize("attack", HOSTILE)
def test_page_escapes_hostile_text(attack: str, tmp_path: Path) -> None:
    """The page has the same elements and attributes as one with harmless words, and the same
    scripts."""
    content = []
    for place, text in (("bad", attack), ("good", "x" * len(attack))):
        clean = text.encode(
            "utf-8", "ignore"
        ).decode()  # JSON and Parquet of quantkit hold no lone surrogates
        fidelity, items = make_hostile_report(clean, clean * 3)
        artifact = write_artifact_folder(tmp_path / place, fidelity)
        (artifact / "quantkit/samples").mkdir()
        parquet.write_table(
            arrow.Table.from_pylist(items), artifact / "quantkit/samples/benchmarks.parquet"
        )
        content.append(Page(html_page.make_page(artifact)))
    bad, good = content
    assert bad.tags == good.tags
    assert bad.scripts[1:] == good.scripts[1:] and len(bad.scripts) == 3
    assert bad.drawings["specs"].keys() == good.drawings["specs"].keys()
    assert (
        "<" not in bad.scripts[0]
        and "\\u202e" not in bad.scripts[0]
        and "\\u0000" not in bad.scripts[0]
    )
    assert not [
        value for name, value in bad.values if name in {"href", "src"} and not value.startswith("#")
    ]
    assert not set("".join(bad.words)) & set("\x00\x1b\u202e")


def test_lone_surrogates_are_replaced() -> None:
    assert (
        html_page.replace_invisible("a\ud800\x07\u202eb\n\tc d\u00a0é")
        == "a\ufffd\ufffd\ufffdb\n\tc d\u00a0é"
    )


def test_policy_allows_only_the_two_hashed_scripts(big: str) -> None:
    page = Page(big)
    policy = next(value for name, value in page.values if value.startswith("default-src"))
    assert policy.startswith("default-src 'none';")
    allowed = re.findall(r"'(sha256-[^']+)'", policy)
    assert allowed == [html_page.compute_csp_hash(script) for script in page.scripts[1:]]
    assert "unsafe-eval" not in policy and "http" not in policy


def test_page_fetches_nothing(big: str) -> None:
    page = Page(big)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "form"}
    assert all(
        value.startswith("#")
        for name, value in page.values
        if name in {"href", "src", "action", "srcset"}
    )
    style = re.search(r"<style>(.*?)</style>", big, re.DOTALL)
    assert style and "url(" not in style.group(1) and "@import" not in style.group(1)


# ----------------------------------------------------------------------------------- size and bytes


def test_page_of_45_000_modules_stays_under_three_megabytes(big: str) -> None:
    assert len(make_large_report().modules) > 44_500
    assert len(big.encode()) < LIMIT_BYTES


def test_page_with_long_answers_and_names_stays_under_three_megabytes(tmp_path: Path) -> None:
    """Every third of 1,500 items changed, each answer of 8,000 characters of which most need
    escaping."""
    artifact = write_artifact_folder(tmp_path, make_large_report())
    (artifact / "quantkit/samples").mkdir()
    dice = random.Random(2)
    rows = [make_item(n, "".join(dice.choices("<&\"'>é漢", k=400)) * 20) for n in range(1_500)]
    parquet.write_table(
        arrow.Table.from_pylist(rows), artifact / "quantkit/samples/benchmarks.parquet"
    )
    text = html_page.make_page(artifact)
    assert len(text.encode()) < LIMIT_BYTES
    shown = text.count("<article")
    assert 50 < shown < 500
    assert f"{500 - shown} more changed items in quantkit/samples/benchmarks.parquet." in text


def test_page_is_reproducible_across_processes(tmp_path: Path) -> None:
    """In other processes with other hash seeds and time zones."""
    artifact = write_artifact_folder(tmp_path, make_judged_example(), items=60)
    code = (
        "import sys, pathlib; from quantkit.report.html_page import make_page;"
        "sys.stdout.buffer.write(make_page(pathlib.Path(sys.argv[1])).encode())"
    )
    content = [
        subprocess.run(
            [sys.executable, "-c", code, str(artifact)],
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": zone},
            check=True,
            capture_output=True,
        ).stdout
        for seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo"))
    ]
    assert content[0] == content[1] == html_page.make_page(artifact).encode()


# ------------------------------------------------------------------------------------------ samples


def test_histogram_counts_every_token(tmp_path: Path) -> None:
    kl = [0.0, -1e-12, 1e-12, 2e-9, 1.0, 9.9, 0.0101, float("inf"), float("nan")]
    (tmp_path / "quantkit/samples").mkdir(parents=True)
    columns = {"domain": ["a"] * 6 + ["b"] * 3, "kl": arrow.array(kl, arrow.float32())}
    parquet.write_table(arrow.table(columns), tmp_path / "quantkit/samples/tokens.parquet")
    result = read_samples(tmp_path, {}).histogram
    assert result is not None
    assert (
        result.tokens == 7
        and result.not_finite == 2
        and result.start == FLOOR
        and result.bins == 40
    )
    placed = {
        (name, n): count
        for name, counts in result.counts.items()
        for n, count in enumerate(counts)
        if count
    }
    assert placed == {("a", 0): 3, ("a", 1): 1, ("a", 36): 1, ("a", 39): 1, ("b", 28): 1}


def test_changed_items_are_sorted_and_use_the_scoring_filter(tmp_path: Path) -> None:
    (tmp_path / "quantkit/samples").mkdir(parents=True)
    rows = [make_item(n, "") for n in range(12)]
    rows += [{**row, "filter": "lenient", "quant_score": 0.5} for row in rows]
    rows += [{**make_item(3, ""), "task": "other", "base_score": None}]
    rows[1]["quant_response"] = "in other words"
    parquet.write_table(
        arrow.Table.from_pylist(rows), tmp_path / "quantkit/samples/benchmarks.parquet"
    )
    result = read_samples(tmp_path, {"gsm8k": "strict", "mgsm_zh": "unknown"})
    assert [(item.task, item.item, item.lost) for item in result.changed] == [
        ("mgsm_zh", 0, True),
        ("mgsm_zh", 6, True),
        ("gsm8k", 3, False),
        ("gsm8k", 9, False),
    ]
    assert (result.items, result.reworded) == (12, 1)
    loose = read_samples(tmp_path, {"gsm8k": "lenient", "mgsm_zh": "lenient"})
    assert len(loose.changed) == 12


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("128 cakes.", "118 cakes.", ("128", "118")),
        ("so 41", "so 418 and more", ("41", "418")),
        ("the cat", "the dog", ("cat", "dog")),
        ("a = b", "a + b", ("=", "+")),
        ("same, then nothing", "same", (",", "")),
        ("答案是四", "答案是五", ("四", "五")),
        ("ends", "ends\nhere", ("", "\n")),
        ("", "x", ("", "x")),
        ("x" * 90 + "1 rest", "x" * 90 + "2 rest", ("x" * 23 + "1", "x" * 23 + "2")),
    ],
)
def test_excerpt_marks_the_word_with_the_first_difference(
    first: str, second: str, expected: tuple[str, str]
) -> None:
    place = len(os.path.commonprefix([first, second]))
    for text, differs in zip((first, second), expected):
        shown = html_page.cut_excerpt(
            Answer(text=text, score=1.0, outcome="", n_tokens=1, truncated=False), place
        )
        assert shown.before + shown.differs + shown.after == text
        assert shown.differs.endswith(differs) and len(shown.differs) <= 26
        assert len(shown.before) <= place <= len(shown.before) + max(1, len(shown.differs))


def test_excerpt_cuts_long_answers_around_the_difference() -> None:
    text = "a " * 5_000 + "HERE" + " b" * 5_000
    shown = html_page.cut_excerpt(
        Answer(text=text, score=1.0, outcome="", n_tokens=1, truncated=False), 10_000
    )
    assert shown.differs == "HERE"
    assert shown.cut_before + len(shown.before) == 10_000
    assert shown.cut_before + len(shown.before) + len(shown.differs) + len(
        shown.after
    ) + shown.cut_after == len(text)
    assert len(shown.before) == html_page.BEFORE


@pytest.mark.parametrize("content", [b"not parquet", b""])
def test_damaged_samples_raise_artifact_error(content: bytes, tmp_path: Path) -> None:
    artifact = write_artifact_folder(tmp_path, make_judged_example(), items=6)
    (artifact / "quantkit/samples/tokens.parquet").write_bytes(content)
    with pytest.raises(
        ArtifactError, match=r"tokens\.parquet: expected samples with the columns domain, kl, found"
    ):
        html_page.make_page(artifact)


def test_samples_without_a_column_raise_artifact_error(tmp_path: Path) -> None:
    artifact = write_artifact_folder(tmp_path, make_judged_example(), items=6)
    rows = [{key: value for key, value in make_item(1, "").items() if key != "quant_response"}]
    parquet.write_table(
        arrow.Table.from_pylist(rows), artifact / "quantkit/samples/benchmarks.parquet"
    )
    with pytest.raises(
        ArtifactError,
        match=r"benchmarks\.parquet: expected samples with the columns .*quant_response",
    ):
        html_page.make_page(artifact)


# -------------------------------------------------------------------------------------------- plots


def test_layer_errors_are_percentiles_of_quantized_matrices() -> None:
    modules = [
        ModuleResult(
            name=f"model.layers.{layer}.mlp.experts.{n}.up_proj",
            rule="r",
            method="awq",
            scheme="s",
            relative_error=(n + 1) / 100 + layer,
            output_relative_error=None if layer else 0.0,
        )
        for layer, n in product((0, 1), range(11))
    ]
    kept = [
        ModuleResult(
            name="model.layers.1.mlp.gate", rule="r", method=None, scheme="BF16", relative_error=9.0
        )
    ]
    rows = charts.summarize_layer_errors([*modules, *kept])
    assert [(row["kind"], row["layer"], row["matrices"]) for row in rows] == [
        ("outputs", 0, 11),
        ("weights", 0, 11),
        ("weights", 1, 11),
    ]
    assert rows[1] | {} == {
        "kind": "weights",
        "layer": 0,
        "low": 0.02,
        "median": 0.06,
        "high": 0.10,
        "worst": 0.11,
        "matrices": 11,
    }
    assert rows[0]["median"] == charts.SMALLEST  # a logarithm needs one


def test_shade_bounds_start_at_the_required_minimum() -> None:
    def ends(*tokens: int, least: int = 64) -> list[int]:
        layer = {"block": "b", "tokens": tokens}
        return charts.compute_shade_bounds(
            ExpertCoverage.model_validate({"min_tokens": least, "policy": "p", "layers": [layer]})
        )

    assert ends(3, 100, 6_400) == [64, 200, 400, 800, 1_600, 3_200]
    assert ends(100, 100) == [64, 100]
    assert ends(1, 2) == [64]
    assert ends(0, 0, least=0) == [1]


def test_heatmap_describes_under_calibrated_experts(big: str) -> None:
    low = len(make_large_report().experts.list_uncalibrated())  # type: ignore[union-attr]
    words = "".join(Page(big).words)
    assert f"{low} of 14,848 routed experts saw fewer than 256 tokens (crossed)" in words
    spec = Page(big).drawings["specs"]["experts"]
    assert sum(len(row["tokens"]) for row in spec["data"]["values"]) == 58 * 256


def test_vega_lite_compiles_every_plot(big: str) -> None:
    from vl_convert import vegalite_to_vega

    drawings = Page(big).drawings
    assert list(drawings["specs"]) == ["layers", "blocks", "kl", "experts", "bits"]
    for name, spec in drawings["specs"].items():
        compiled = vegalite_to_vega({**spec, "config": drawings["config"]})
        assert compiled["marks"], name


# --------------------------------------------------------------------------------- names of modules


def expand_names(line: str) -> Iterator[str]:
    """Yield the names of a folded line."""
    parts = re.split(r"\{([^}]*)\}", line)
    choices = []
    for text in parts[1::2]:
        ends = [item.split("-") for item in text.split(", ")]
        choices.append([n for end in ends for n in range(int(end[0]), int(end[-1]) + 1)])
    for numbers in product(*choices):
        yield "".join(text + str(n) for text, n in zip(parts[::2], [*numbers, ""]))


NAMES = some.lists(
    some.builds(
        "model.layers.{}.mlp.experts.{}.{}".format,
        some.integers(0, 5),
        some.integers(0, 9),
        some.sampled_from("gu"),
    )
    | some.builds(
        "model.layers.{}.{}".format, some.integers(0, 5), some.sampled_from(["a1", "q_proj"])
    )
    | some.just("lm_head")
)


@given(NAMES)
def test_fold_names_is_lossless(names: list[str]) -> None:
    lines = fold_names(names)
    result = [name for line in lines for name in expand_names(line)]
    assert sorted(result) == sorted(set(names))
    assert len(lines) <= len(set(names))


def test_fold_names_examples() -> None:
    names = [f"m.{a}.e.{b}.w1" for a in (1, 2) for b in (0, 1, 2, 7)]
    assert fold_names(names) == ["m.{1-2}.e.{0-2, 7}.w1"]
    assert fold_names(["a.1.b", "lm_head", "a.3.b"]) == ["a.{1, 3}.b", "lm_head"]
    assert fold_names([f"x.{'9' * 5_000}.y"]) == [f"x.{'9' * 5_000}.y"]  # an unusable number
    assert find_block_number("model.layers.12.mlp") == 12 and find_block_number("lm_head") is None


# ------------------------------------------------------------------------------- inside an artifact


def test_report_command_rebuilds_the_page_of_a_build(artifact: Path) -> None:
    page = artifact / PAGE
    sealed = page.read_bytes()
    manifest = json.loads((artifact / "quantkit/manifest.json").read_text())
    assert manifest["files"][PAGE]["bytes"] == len(sealed)
    page.unlink()
    shown = CliRunner().invoke(main, ["report", str(artifact), "--html"])
    assert (shown.exit_code, shown.stdout) == (0, f"{page}\n")
    assert page.read_bytes() == sealed
    assert verify_artifact(artifact).status == "not judged"


def test_report_command_writes_a_different_page_only_to_another_file(
    artifact: Path, tmp_path: Path
) -> None:
    """Samples that were taken away give another page; in the artifact it would break the
    manifest's hash."""
    shutil.rmtree(artifact / "quantkit/samples")
    before = (artifact / PAGE).read_bytes()
    refused = CliRunner().invoke(main, ["report", str(artifact), "--html"])
    assert refused.exit_code == 1
    assert "expected the page that these files make, found another or none" in refused.stderr
    assert (artifact / PAGE).read_bytes() == before
    output = tmp_path / "review.html"
    shown = CliRunner().invoke(
        main, ["report", str(artifact), "--html", "--output", str(output), "--json"]
    )
    assert json.loads(shown.stdout) == {"html": str(output)}
    assert output.read_bytes() != before and b"<h1>tiny</h1>" in output.read_bytes()


def test_report_command_rejects_changed_figures(artifact: Path, tmp_path: Path) -> None:
    path = artifact / "quantkit/fidelity.json"
    path.write_text(path.read_text().replace('"version": 2', '"version":  2', 1))
    for options in ((), ("--json",), ("--html", "--output", str(tmp_path / "x.html"))):
        result = CliRunner().invoke(main, ["report", str(artifact), *options])
        assert result.exit_code == 1 and result.stdout == ""
        assert (
            "fidelity.json: expected the file that quantkit/manifest.json names, found another"
            in result.stderr
        )


def test_report_command_rejects_output_without_html(artifact: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["report", str(artifact), "--output", str(tmp_path / "x.html")]
    )
    assert result.exit_code == 2 and "--output: expected --html with it" in result.stderr


def test_rows_of_tiles_are_full() -> None:
    """No tile stands alone in its row, on wide pages and on those of half the width."""
    for most in (7, 5):
        for n in range(2, 15):
            tiles = [html_page.Tile(label="a", value="1")] * n
            columns = html_page.count_columns(tiles, most)
            assert columns <= most and (n % columns or columns) > 1
