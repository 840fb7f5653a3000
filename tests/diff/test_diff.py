"""Comparison of two artifacts: values against scipy, comparability, golden views."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import exp, sqrt
from typing import Any

import pytest
from markdown_it import MarkdownIt
from scipy import stats
from support.diff_example import (
    A_SCORES,
    B_SCORES,
    EXPERT,
    N_TOKENS,
    SOURCE,
    make_answer,
    make_items,
    make_report,
    make_side_a,
    make_side_b,
    make_tokens,
)
from support.paths import GOLDEN
from support.report_large import make_large_report
from support.report_variants import render_to_text

from quantkit.artifact.fidelity_schema import DistributionResult, Fidelity
from quantkit.diff import render_text, tables
from quantkit.diff.compare import compare_sides
from quantkit.diff.diff_schema import Diff, TensorGroup
from quantkit.diff.headline import format_headline
from quantkit.diff.sides import Side
from quantkit.errors import NotComparable
from quantkit.report import markdown


@pytest.fixture(scope="module")
def diff() -> Diff:
    """B compared with A."""
    return compare_sides(make_side_a(), make_side_b())


def change_text(side: Side, **changes: object) -> Side:
    """Return the side with another fidelity text."""
    text = side.fidelity.measured_on
    assert text is not None
    return replace(
        side,
        fidelity=side.fidelity.model_copy(update={"measured_on": text.model_copy(update=changes)}),
    )


# -------------------------------------------------------------------------------------------- views


def test_terminal_view_matches_golden_file(diff: Diff) -> None:
    assert render_to_text(render_text.render_terminal(diff)) == (GOLDEN / "diff.txt").read_text()


def test_markdown_view_matches_golden_file(diff: Diff) -> None:
    assert render_text.render_markdown(diff) == (GOLDEN / "diff.md").read_text()


def test_values_round_trip_through_json(diff: Diff) -> None:
    text = json.dumps(diff.model_dump(mode="json"), allow_nan=False)
    assert Diff.model_validate(json.loads(text)) == diff


def test_diff_of_a_side_with_itself_is_empty() -> None:
    result = compare_sides(make_side_a(), make_side_a())
    assert (
        result.recipe,
        result.decisions,
        result.tensors,
        result.flips,
        result.made_with,
        result.fallbacks,
    ) == ((),) * 6
    assert {row.verdict for row in result.benchmarks} == {
        "not resolved (n = 60, detectable 4.7 pp)"
    }
    assert {row.shift for row in (*result.modules, *result.blocks, *result.routers)} == {0.0}
    assert "The weight files of both are identical." in result.notes
    assert {row.resolved for row in result.distribution if row.resolved} == {"not resolved"}
    assert tables.make_module_table(result, 10).rows == ()


# ---------------------------------------------------------------------------------- recipe, tensors


def test_inherited_recipe_keys_are_listed_once(diff: Diff) -> None:
    """A value that the rule inherits from `quantize` is not listed again."""
    assert [(row.key, row.a, row.b) for row in diff.recipe] == [
        ("quantize.method", "awq", "rtn"),
        ("quantize.bits", "4", "3"),
        ("format", '["awq"]', '["dense"]'),
        ("calibration.set", "tiny-v3", None),
    ]


def test_plans_are_compared_key_by_key(diff: Diff) -> None:
    assert [(row.key, row.a, row.b) for row in diff.plan] == [
        ("rules[0].modules", "2", "3"),
        ("rules[0].bytes_after", "4000000", "2700000"),
    ]


def test_change_of_one_rule_is_listed() -> None:
    other = make_side_b()
    rules = [
        {"label": "rules[0]", "match": "*", "quantize": {"method": "rtn", "bits": 8}, "keep": None}
    ]
    result = compare_sides(
        make_side_a(), replace(other, recipe={**(other.recipe or {}), "rules": rules})
    )
    assert ("rules[0].quantize.bits", "4", "8") in [
        (row.key, row.a, row.b) for row in result.recipe
    ]


def test_tensor_changes_are_grouped(diff: Diff) -> None:
    folded = EXPERT.format("{0-1}")
    assert diff.tensors == (
        TensorGroup(change="removed", a="I32", b="none", count=2, names=(f"{folded}.qweight",)),
        TensorGroup(change="added", a="none", b="BF16", count=2, names=(f"{folded}.weight",)),
        TensorGroup(change="dtype", a="BF16", b="F16", count=1, names=("lm_head.weight",)),
        TensorGroup(change="shape", a="[256]", b="[128]", count=1, names=("model.norm.weight",)),
    )
    assert [(row.a, row.b, row.count) for row in diff.decisions] == [
        ("awq int4 g128 asymmetric", "rtn int3 g128 asymmetric", 2),
        ("keep", "rtn int3 g128 asymmetric", 1),
    ]


def test_reports_without_plans_compare_schemes() -> None:
    sides = [
        Side(name=name, kind="report", fidelity=side.fidelity)
        for name, side in (("a", make_side_a()), ("b", make_side_b()))
    ]
    result = compare_sides(*sides)
    assert [(row.change, row.a, row.b, row.count) for row in result.decisions] == [
        ("scheme", "int4 g128 asymmetric", "int3 g128 asymmetric", 2),
        ("scheme", "not quantized", "int3 g128 asymmetric", 1),
    ]
    assert result.tensors == () and result.recipe == () and result.flips == ()
    assert [(row.task, row.a, row.b, row.verdict) for row in result.benchmarks] == [
        ("tiny-v3-math", 0.82, 0.82, "not paired: no samples with fidelity.json"),
    ]
    assert all(row.difference is row.ratio is None for row in result.distribution)
    assert sum("is a single fidelity.json" in note for note in result.notes) == 2
    assert "no interval" in tables.make_distribution_table(result).note


def test_sizes_of_both_sides(diff: Diff) -> None:
    rows = {row.name: (row.a, row.b) for row in diff.sizes}
    assert rows["weights"] == (6_412_345, 5_100_000)
    assert rows["the whole folder"] == (6_413_245, 5_100_900)
    assert rows["quantized matrices"] == (2, 3)


# --------------------------------------------------------------------------------------- statistics


def test_benchmarks_are_paired_and_agree_with_scipy(diff: Diff) -> None:
    row = diff.benchmarks[0]
    lost = sum(a > b for a, b in zip(A_SCORES, B_SCORES, strict=True))
    gained = sum(b > a for a, b in zip(A_SCORES, B_SCORES, strict=True))
    assert (row.n, row.lost, row.gained) == (60, lost, gained) == (60, 12, 0)
    assert row.mcnemar_p == pytest.approx(
        stats.binomtest(min(lost, gained), lost + gained, 0.5).pvalue
    )
    assert row.delta_pp is not None and row.delta_pp.ci is not None
    assert row.delta_pp.value == pytest.approx(100 * (sum(B_SCORES) - sum(A_SCORES)) / 60)
    down, up, z = (lost + 1) / 62, (gained + 1) / 62, stats.norm.ppf(0.975)  # Bonett & Price 2012
    half = z * sqrt((down + up - (up - down) ** 2) / 62)
    assert row.delta_pp.ci == pytest.approx((100 * (up - down - half), 100 * (up - down + half)))
    assert (row.source, row.a, row.b, row.verdict) == (0.75, 0.75, 0.55, "worse")


def test_flips_have_both_answers_and_lost_items_first() -> None:
    b = replace(
        make_side_b(), items=make_items([0.0, *A_SCORES[1:-4], 1.0, *A_SCORES[-3:]], SOURCE)
    )
    result = compare_sides(make_side_a(), b)
    assert [(flip.item, flip.lost, flip.a.text, flip.b.text) for flip in result.flips] == [
        (0, True, "It is 0", "It is 1"),
        (56, False, "It is 57", "It is 56"),
    ]
    assert (result.compared_items, result.reworded) == (60, 0)
    assert (result.flips[0].prompt, result.flips[0].target, result.flips[0].source_score) == (
        "Question: what is 0?\nAnswer:",
        "0",
        1.0,
    )


def test_reworded_answers_are_counted() -> None:
    b, key = make_side_a(), ("tiny-v3-math", "answer", 5)
    assert b.items is not None
    changed = {**b.items, key: replace(b.items[key], answer=make_answer("Surely 5", 1.0))}
    assert compare_sides(make_side_a(), replace(b, items=changed)).reworded == 1


def pick_domain(values: Any, domain: str) -> list[float]:
    """Return the values of a domain's tokens."""
    return [
        v
        for v, name in zip(values, make_tokens(1.0).domains, strict=True)
        if domain in ("all", name)
    ]


@pytest.mark.parametrize("domain", ["all", "math"])
def test_token_differences_agree_with_scipy(domain: str) -> None:
    """Without documents each token is its own, and intervals are Student's."""
    rows = [
        {
            "domain": name,
            "tokens": N_TOKENS if name == "all" else 400,
            "kl_mean": {"value": 0.1},
            "ppl_artifact": {"value": 3.0},
            "top1": {"value": 0.9},
            "mean_delta_p": {"value": 0.0},
        }
        for name in ("all", "math")
    ]
    a, b = (
        replace(
            side,
            fidelity=make_report(distribution=rows),
            tokens=replace(side.tokens, documents=None) if side.tokens else None,
        )
        for side in (make_side_a(), make_side_b())
    )
    assert a.tokens is not None and b.tokens is not None
    result = {row.figure: row for row in compare_sides(a, b).distribution if row.domain == domain}
    for figure, one, two, map_ in (
        ("ppl_artifact", a.tokens.nll, b.tokens.nll, exp),
        ("mean_delta_p", [exp(-x) for x in a.tokens.nll], [exp(-x) for x in b.tokens.nll], None),
    ):
        change = [
            y - x for x, y in zip(pick_domain(one, domain), pick_domain(two, domain), strict=True)
        ]
        mean, error = sum(change) / len(change), float(stats.sem(change))
        t = float(stats.t.ppf(0.975, len(change) - 1))
        expected = [mean, mean - t * error, mean + t * error]
        values = result[figure].ratio if map_ else result[figure].difference
        assert values is not None and values.ci is not None
        assert [values.value, *values.ci] == pytest.approx([
            map_(x) if map_ else x for x in expected
        ])
    same = [pick_domain(side.tokens.same_top, domain) for side in (a, b) if side.tokens]
    values = result["top1"].difference
    assert values is not None and values.value == pytest.approx(
        sum(same[1]) / len(same[1]) - sum(same[0]) / len(same[0])
    )
    assert result["kl_mean"].resolved == "worse" and result["top1"].resolved == "worse"


def test_gold_solutions_are_paired_and_agree_with_scipy(diff: Diff) -> None:
    (row,) = diff.likelihood
    first, second = make_side_a().solutions or {}, make_side_b().solutions or {}
    change = [second[key].value - first[key].value for key in first]
    assert row.difference is not None and row.difference.ci is not None
    half = float(stats.norm.ppf(0.975) * stats.sem(change))
    assert row.difference.ci == pytest.approx((sum(change) / 20 - half, sum(change) / 20 + half))
    assert (row.task, row.n, row.source, row.a, row.b, row.resolved) == (
        "tiny-v3-math",
        20,
        -0.5,
        -0.502,
        -0.54,
        "worse",
    )
    alone = compare_sides(replace(make_side_a(), solutions=None), make_side_b()).likelihood[0]
    assert (alone.difference, alone.n, alone.b) == (None, 20, -0.54)


def test_two_uncalibrated_sides_have_no_calibration_note() -> None:
    sides = [
        replace(s, fidelity=s.fidelity.model_copy(update={"calibration": None}))
        for s in (make_side_a(), make_side_b())
    ]
    assert not any("calibration" in note for note in compare_sides(*sides).notes)


def test_all_tasks_are_pooled() -> None:
    """Items of two tasks count as one sample, and each task keeps its own line."""
    a, b = (
        replace(side, items={**(side.items or {}), **make_items(scores[:30], SOURCE[:30], "code")})
        for side, scores in ((make_side_a(), A_SCORES), (make_side_b(), B_SCORES))
    )
    rows = {row.task: row for row in compare_sides(a, b).benchmarks}
    assert list(rows) == ["tiny-v3-math", "code", "all tasks"]
    assert (rows["all tasks"].n, rows["all tasks"].lost) == (
        90,
        (rows["tiny-v3-math"].lost or 0) + (rows["code"].lost or 0),
    )


def test_non_finite_token_gives_no_difference() -> None:
    bad = make_tokens(0.004, seed=2)
    b = replace(make_side_b(), tokens=replace(bad, kl=[float("inf"), *list(bad.kl)[1:]]))
    result = {(row.domain, row.figure): row for row in compare_sides(make_side_a(), b).distribution}
    assert result["all", "kl_mean"].ratio is None and result["all", "top1"].difference is not None
    assert result["all", "kl_mean"].resolved == "" and result["math", "kl_mean"].resolved == "worse"


# ------------------------------------------------------------------------------------------- errors


def test_modules_are_sorted_by_error_shift(diff: Diff) -> None:
    assert [(row.name, row.by, round(row.shift or 0, 4)) for row in diff.modules] == [
        (EXPERT.format(0), "outputs", 0.1588),
        (EXPERT.format(1), "outputs", -0.0434),
        ("lm_head", "outputs", 0.02),
    ]
    assert diff.modules[2].a == 0.0  # kept in A


def test_different_calibration_texts_compare_weight_errors() -> None:
    b = make_side_b()
    result = compare_sides(
        make_side_a(), replace(b, fidelity=b.fidelity.model_copy(update={"calibration": None}))
    )
    assert {row.by for row in result.modules} == {"weights"}
    assert any(note.startswith(f"{b.name} used no calibration text, so") for note in result.notes)


# ------------------------------------------------------------------------------- comparability

Change = Callable[[Side], Side]


def other_source(side: Side) -> Side:
    """Made from another checkpoint."""
    source = side.fidelity.source.model_copy(update={"hash": "99" * 32, "model": "org/other"})
    return replace(side, fidelity=side.fidelity.model_copy(update={"source": source}))


def other_source_bytes(side: Side) -> Side:
    """Made from a checkpoint with the same headers and other weights: a fine-tuned one."""
    return replace(side, source_files={"model.safetensors": "88" * 32})


def other_text(side: Side) -> Side:
    """Measured on other text."""
    return change_text(side, sha256="ef" * 32)


def fewer_windows(side: Side) -> Side:
    """Measured on a part of the text."""
    return change_text(side, sequences=10)


def other_prompt(side: Side) -> Side:
    """One item has another prompt."""
    key = ("tiny-v3-math", "answer", 7)
    changed = replace((side.items or {})[key], hashes=("doc7", "other", "target7"))
    return replace(side, items={**(side.items or {}), key: changed})


def other_data(side: Side) -> Side:
    """Tested on another version of the task."""
    rows = [row.model_copy(update={"data_sha256": "21" * 32}) for row in side.fidelity.benchmarks]
    return replace(side, fidelity=side.fidelity.model_copy(update={"benchmarks": tuple(rows)}))


def other_solutions(side: Side) -> Side:
    """Scored on another version of the gold solutions."""
    rows = [row.model_copy(update={"data_sha256": "21" * 32}) for row in side.fidelity.likelihood]
    return replace(side, fidelity=side.fidelity.model_copy(update={"likelihood": tuple(rows)}))


REFUSED: Mapping[str, tuple[Change, str, tuple[str, ...]]] = {
    "source": (
        other_source,
        r"first was made from builtin:tiny-v3 \(5f5f.*\), second was made from org/other "
        r"\(9999.*\): figures against "
        r"different sources are not comparable",
        ("distribution", "benchmarks", "blocks", "modules", "routers", "flips"),
    ),
    "weights": (
        other_source_bytes,
        r".*7777.*8888.*different sources",
        ("distribution", "benchmarks", "modules", "flips"),
    ),
    "text": (
        other_text,
        r"first was measured on tiny-v3-heldout \(cdcdcdcdcdcd, 20 x 512 tokens\), "
        r"second .*: distributions on "
        r"different texts are not comparable",
        ("distribution", "blocks", "routers"),
    ),
    "windows": (
        fewer_windows,
        r".*10 x 512 tokens\): distributions on different texts",
        ("distribution", "blocks"),
    ),
    "prompt": (
        other_prompt,
        r"tiny-v3-math: the prompt of item 7 differs between first and second "
        r"\(prompt_hash differs\): the "
        r"scores are not comparable",
        ("flips",),
    ),
    "data": (
        other_data,
        r"tiny-v3-math: first was tested on other data \(1212.*\) than second \(2121.*\)",
        ("flips", "likelihood"),
    ),
    "solutions": (
        other_solutions,
        r"tiny-v3-math: first was tested on other data",
        ("flips", "likelihood"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_incomparable_sides_are_rejected_with_the_reason(case: str) -> None:
    change, sentence, _ = REFUSED[case]
    with pytest.raises(NotComparable) as caught:
        compare_sides(make_side_a(), change(make_side_b()))
    assert re.fullmatch(sentence + r".*; --partial compares the rest", str(caught.value))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("case", REFUSED)
def test_partial_compares_the_rest(case: str) -> None:
    change, sentence, gone = REFUSED[case]
    result, whole = (
        compare_sides(make_side_a(), change(make_side_b()), partial=True),
        compare_sides(make_side_a(), make_side_b()),
    )
    assert re.match(sentence, result.left_out[0])
    assert (
        result.sizes == whole.sizes
        and result.recipe == whole.recipe
        and result.tensors == whole.tensors
    )
    for name in gone:
        assert getattr(result, name) == () and getattr(whole, name) != (), name
    assert not any(row.delta_pp for row in result.benchmarks) or "flips" not in gone
    assert "left out: " in render_to_text(
        render_text.render_terminal(result)
    ) and "left out: " in render_text.render_markdown(result)


def test_items_of_one_side_only_are_counted() -> None:
    result = compare_sides(
        make_side_a(), replace(make_side_b(), items=make_items(B_SCORES[:40], SOURCE[:40]))
    )
    assert result.benchmarks[0].n == 40
    assert "tiny-v3-math: 40 items are in both, 20 in one only." in result.notes


def test_changed_baseline_is_noted() -> None:
    moved = make_tokens(0.004, seed=2)
    moved = replace(moved, nll_source=[x + 1e-3 for x in moved.nll_source])
    result = compare_sides(
        make_side_a(),
        replace(make_side_b(), tokens=moved, items=make_items(B_SCORES, [0.0, *SOURCE[1:]])),
    )
    assert any("differ by up to 0.001 nats between the two builds" in note for note in result.notes)
    assert any("has other scores on 1 items" in note for note in result.notes)


# ----------------------------------------------------------------------------------- large, hostile


@pytest.fixture(scope="module")
def large_sides() -> tuple[Side, Side]:
    """Two reports of DeepSeek-V3's size, with 600 items of which a third flipped."""
    one = make_large_report()
    modules = [
        m.model_copy(update={"output_relative_error": 0.01}) if m.method else m for m in one.modules
    ]
    two = one.model_copy(update={"modules": tuple(modules), "benchmarks": ()})
    many = [1.0] * 600
    sides = [
        Side(
            name=n,
            kind="artifact",
            fidelity=f,
            items=make_items([float(k % 3 > 0 or n == "a") for k in range(600)], many),
        )
        for n, f in (("a", one.model_copy(update={"benchmarks": ()})), ("b", two))
    ]
    return sides[0], sides[1]


def test_markdown_of_a_large_model_fits_a_comment(large_sides: tuple[Side, Side]) -> None:
    result = compare_sides(*large_sides)
    assert len(result.modules) == 44_544 and len(result.flips) == 200
    text = render_text.render_markdown(result)
    assert 5_000 < len(text) < render_text.MAX_CHARACTERS
    assert "44,4" in text and "more rows in quantkit diff --json." in text
    assert text.count("<details>") == text.count("</details>") > 3


def iterate_hostile_texts() -> Iterator[str]:
    """Yield text that would end a fence, a cell or a details element, or control a terminal."""
    yield "```\n</details>\n# x\n````\n"
    yield "| a | b |\n<script>x</script> \x1b[2J\u202e"
    yield "`" * 5_000 + "a|b<c*" * 4_000


@pytest.mark.parametrize("text", list(iterate_hostile_texts()), ids=["fence", "cell", "long"])
def test_untrusted_text_is_escaped(text: str) -> None:
    a, b = make_side_a(), make_side_b()
    assert a.items is not None and b.items is not None
    both = []
    for side in (a, b):
        changed = {}
        for key, item in (side.items or {}).items():
            score = item.answer.score if item.answer else 0.0
            changed[key] = replace(
                item, prompt=text, target=text, answer=make_answer(f"{text}{score}", score)
            )
        both.append(replace(side, items=changed, name=text))
    result = compare_sides(*both)
    shown = render_text.render_markdown(result)
    assert len(shown) < render_text.MAX_CHARACTERS
    outside, fence = [], ""
    for line in shown.splitlines():
        opened = re.match(r"`{3,}", line)
        if not fence and opened:
            fence = opened[0]
        elif fence and line == fence:
            fence = ""
        elif not fence:
            outside.append(line)
    assert not fence
    plain = "\n".join(outside)
    assert (
        plain.count("<details>") == plain.count("</details>")
        and "<script" not in plain
        and "\n# x" not in plain
    )
    assert "\x1b" not in render_to_text(render_text.render_terminal(result))


def test_markdown_breaks_mentions_and_issue_links() -> None:
    """GitHub links @name and #12 in a table, not in a fence."""
    b = make_side_a()
    key = ("tiny-v3-math", "answer", 5)
    said = replace(make_answer("#12 @staticmethod", 0.0), outcome="@staticmethod #12 kl@math")
    result = compare_sides(
        make_side_a(),
        replace(
            b,
            name="@team",
            items={**(b.items or {}), key: replace((b.items or {})[key], answer=said)},
        ),
    )
    lines = [
        line
        for line in render_text.render_markdown(result).splitlines()
        if "static" in line or "team" in line
    ]
    fenced = [line for line in lines if line == "#12 @staticmethod"]
    assert len(fenced) == 1 and len(lines) == 4
    for line in set(lines) - set(fenced):
        assert not re.search(r"(?<!\w)[@#]\w", line) and ("kl@math" in line) == ("static" in line)


LIVE = (
    "[click](https://evil.example/x)",
    "![picture](https://evil.example/x.png)",
    "[![both](https://evil.example/x.png)](https://evil.example)",
    "[ref][a] [a]: https://evil.example",
    "[a]: https://evil.example [a]",
    "<https://evil.example> <x@evil.example>",
    "https://evil.example HTTP://EVIL.EXAMPLE ftp://evil.example file:///etc/passwd",
    "www.evil.example WWW.evil.example",
    "someone@evil.example mailto:x@evil.example xmpp:x@evil.example",
    "http&#58;//evil.example &#x77;ww.evil.example www&period;evil.example &lt;b&gt;",
    "@team @team/sub owner/repo#12 #12 GH-12 (@team)",
    '<img src="https://evil.example/x.png" onerror=x> <a href=x>y</a> <!-- z -->',
    "javascript:alert(1) data:text/html,x",
    "`code` ``https://evil.example`` ```",
    "\\[click](https://evil.example) \\\\[click](https://evil.example)",
    "a\u202eb\u2066c\x1b[2J",
)
GITHUB_LINKS = re.compile(
    r"(?i)(https?|ftp|file):/|\bwww\.|(mailto|xmpp|javascript|data):\w|[\w.+-]@[\w-]+\.\w|[@#]\w|gh-\d"
)


@pytest.mark.parametrize("text", LIVE, ids=range(len(LIVE)))
def test_markdown_has_no_live_link_picture_or_html(text: str) -> None:
    """Of answers, outcomes, names, notes and reasons, read as Markdown and with GitHub's rules."""
    b = make_side_a()
    key = ("tiny-v3-math", "answer", 5)
    item = replace((b.items or {})[key], answer=replace(make_answer(text, 0.0), outcome=text))
    side = replace(b, name=text, items={**(b.items or {}), key: replace(item, prompt=text)})
    result = compare_sides(make_side_a(), side)
    result = result.model_copy(update={"notes": (text,), "left_out": (text,)})
    shown = render_text.render_markdown(result)
    assert shown.count("evil") >= 5 or "evil" not in text
    parsed = MarkdownIt("commonmark", {"html": True}).enable("table").parse(shown)
    for token in [part for block in parsed for part in (block, *(block.children or ()))]:
        assert token.type not in ("link_open", "image"), token
        if token.type.startswith("html"):
            assert re.fullmatch(r"(</?details>|<summary>[^<]*</summary>|\s)*", token.content), (
                token.content
            )
        if token.type == "text":
            assert not GITHUB_LINKS.search(token.content), token.content
            assert token.content.replace("\u200b", "").isprintable()
        if token.type == "code_inline":
            assert text.startswith("`") is False


def test_model_card_has_no_link_or_picture_of_a_stranger() -> None:
    for text in LIVE:
        tokens = MarkdownIt("commonmark").parseInline(markdown.escape_cell(text))
        types = {child.type for token in tokens for child in token.children or ()}
        assert not types & {"link_open", "image", "html_inline", "code_inline"}, text


def test_kl_of_a_source_is_zero_and_has_no_factor() -> None:
    """Nothing divides by the source's KL of 0."""
    a = make_side_a()
    rows = [
        DistributionResult.model_validate({**row.model_dump(), "kl_mean": {"value": 0.0}})
        for row in a.fidelity.distribution
    ]
    a = replace(
        a,
        fidelity=a.fidelity.model_copy(update={"distribution": tuple(rows)}),
        tokens=replace(make_tokens(0.0004, seed=1), kl=[0.0] * N_TOKENS),
    )
    result = compare_sides(a, make_side_b())
    assert result.kl == () and "ean KL 0 -> 0.00400, resolved" in format_headline(result)


def test_tokens_of_another_count_are_not_paired() -> None:
    """Samples with another number of tokens than the report are not those of its figures."""
    rows = [{"domain": "all", "tokens": N_TOKENS + 1, "kl_mean": {"value": 0.1}}]
    a, b = (
        replace(side, fidelity=make_report(distribution=rows))
        for side in (make_side_a(), make_side_b())
    )
    assert [row.difference for row in compare_sides(a, b).distribution] == [None]


def test_empty_reports_are_compared() -> None:
    bare = Fidelity.model_validate({
        key: make_report().model_dump()[key] for key in ("artifact", "source")
    })
    side = Side(name="bare", kind="report", fidelity=bare)
    result = compare_sides(side, make_side_a())
    assert result.distribution == () and format_headline(result) == "Both have 6.41 MB of weights."
