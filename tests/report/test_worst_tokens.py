"""Single tokens with their context: tables, pages, bounds, and text of strangers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError
from support.diff_example import make_side_a, make_side_b
from support.report_pages import HOSTILE, Page
from support.report_variants import make_empty_report, make_example, render_to_text

from quantkit.artifact.token_schema import MOST_CONTEXT, MOST_TOKENS
from quantkit.diff import page as diff_page
from quantkit.diff import render_text
from quantkit.diff.compare import compare_sides
from quantkit.diff.diff_schema import Diff, WorseToken
from quantkit.report import html_page, tables, terminal, token_tables
from quantkit.report.samples import Samples


def make_row(
    word: str = " Paris", context: str = "The capital of France is", **changes: Any
) -> Any:
    """Return a token whose texts are all `word`."""
    choices = [{"text": word, "p": 0.62}, {"text": word, "p": 0.001}]
    return {
        "kind": word,
        "sequence": 3,
        "position": 17,
        "context": context,
        "is_cut": True,
        "token": word,
        "kl": 7.9,
        "p_source": 0.62,
        "p_artifact": 0.00001,
        "source": choices,
        "artifact": choices,
        **changes,
    }


def make_diff(word: str, context: str) -> Diff:
    """Return the example diff with a token that got worse."""
    row = make_row(word, context)
    token = WorseToken.model_validate({
        **{key: row[key] for key in ("kind", "sequence", "position", "context", "is_cut", "token")},
        "kl_a": 0.01,
        "kl_b": 7.9,
        "p_source": 0.62,
        "p_a": 0.6,
        "p_b": 0.00001,
        "source": row["source"],
        "b": row["artifact"],
    })
    return compare_sides(make_side_a(), make_side_b()).model_copy(update={"worse_tokens": (token,)})


def test_token_is_shown_with_context_and_both_predictions() -> None:
    fidelity = make_example({"worst_tokens": [make_row()] * MOST_TOKENS})
    content = tables.make_token_table(fidelity)
    assert len(content.rows) == token_tables.SHOWN and "worst 5 of the 20" in content.note
    assert content.rows[0] == (
        '…"The capital of France is"',
        '" Paris" 62 % to <0.01 %',
        "7.90",
        '" Paris" 62 %',
        '" Paris" 62 %',
        " Paris",
    )
    shown = render_to_text(terminal.render_report(fidelity), width=160)
    assert '" Paris" 62 % to <0.01 %' in shown
    words = Page(html_page.render_page(fidelity, Samples())).words
    assert words.count("true token <0.01 %") == MOST_TOKENS
    assert "The capital of France is" in words and "1. KL 7.90 " in words


def test_report_without_tokens_says_why() -> None:
    sentence = token_tables.describe_no_tokens(make_example())
    assert sentence.startswith("An earlier version of quantkit made this report")
    assert sentence in Page(html_page.render_page(make_example(), Samples())).words
    assert token_tables.describe_no_tokens(make_empty_report()) == "No token was measured."


def test_diff_of_samples_without_ids_says_why() -> None:
    a, b = make_side_a(), make_side_b()
    assert a.tokens is not None
    old = replace(a, tokens=replace(a.tokens, ids=None, places=None))
    diff = compare_sides(old, b)
    assert [note for note in diff.notes if note.startswith("first was built by an earlier version")]
    assert diff.worse_tokens == ()
    assert "the sides kept no tokens with their text" in diff_page.render_page(diff)


@pytest.mark.parametrize("attack", HOSTILE)
def test_text_of_strangers_is_escaped(attack: str) -> None:
    """The pages have the elements of pages with harmless words; a terminal gets no control code."""
    word = attack.encode("utf-8", "ignore").decode()[:60]
    pages = []
    for text in (word, "x" * len(word)):
        fidelity = make_example({"worst_tokens": [make_row(text, text)]})
        diff = make_diff(text, text)
        pages.append([
            Page(html_page.render_page(fidelity, Samples())),
            Page(diff_page.render_page(diff)),
        ])
        assert "\x1b" not in render_to_text(terminal.render_report(fidelity))
        assert "\x1b" not in render_to_text(render_text.render_terminal(diff))
        comment = render_text.render_markdown(diff)
        assert "<script" not in comment and "<img" not in comment and "\x1b" not in comment
    for bad, good in zip(*pages, strict=True):
        assert bad.tags == good.tags and len(bad.scripts) == 3
        assert not set("".join(bad.words)) & set("\x00\x1b\u202e")


def test_side_that_kept_no_prediction_says_so() -> None:
    """A keeps the predictions of its own largest KL only."""
    words = Page(diff_page.render_page(make_diff(" Paris", "The capital of France is"))).words
    assert words.count("Not kept: the KL is not among this side's largest.") == 1
    assert "1. KL 0.0100 → 7.90 " in words


def test_texts_of_a_report_are_bounded() -> None:
    """A fidelity.json of a stranger cannot fill a page."""
    for changes in (
        {"worst_tokens": [make_row()] * (MOST_TOKENS + 1)},
        {"worst_tokens": [make_row(context="x" * (MOST_CONTEXT + 1))]},
        {"worst_tokens": [make_row("x" * 81)]},
        {"worst_tokens": [make_row(p_source=1.5)]},
        {"worst_tokens": [make_row(source=[{"text": "a", "p": 0.1}] * 6)]},
    ):
        with pytest.raises(ValidationError):
            make_example(changes)


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0, "0 %"), (0.00009, "<0.01 %"), (0.0031, "0.31 %"), (0.618, "62 %"), (1, "100 %")],
)
def test_probabilities_are_short(p: float, text: str) -> None:
    assert token_tables.format_share(p) == text


def test_white_space_and_control_characters_stay_on_one_line() -> None:
    assert token_tables.quote_token("\n\t\x1b é") == '"\\n\\t\\u001b é"'
