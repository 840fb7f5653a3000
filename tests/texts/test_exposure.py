"""Kinds that calibration had and did not have: sentences, shares, the plan's rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.word_tokenizer import WordTokenizer

from quantkit.texts.corpora import load_set, sample_sequences
from quantkit.texts.exposure import (
    compute_unseen_share,
    describe_exposure,
    describe_narrowness,
    format_labels,
    get_language,
    pool_small_kinds,
    raise_unseen_share,
)


@pytest.mark.parametrize(
    ("label", "language"), [("web", "en"), ("web-zh", "zh"), ("web-pt-BR", "pt-BR")]
)
def test_language_of_a_label(label: str, language: str) -> None:
    assert get_language(label) == language


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["prose", "math", "code"], "3 kinds of text (code, math, prose) in 1 language (en)"),
        (["prose"], "1 kind of text (prose) in 1 language (en)"),
        (["a", "b", "c", "d"], "4 kinds of text (a, b, c, d) in 1 language (en)"),
        (["a", "b", "c-zh"], "3 kinds of text (a, b, c-zh) in 2 languages (en, zh)"),
    ],
)
def test_few_kinds_or_one_language_are_narrow(labels: list[str], words: str) -> None:
    sentence = describe_narrowness(labels)
    assert sentence.startswith("narrow calibration: ") and words in sentence


def test_four_kinds_in_two_languages_are_not_narrow() -> None:
    assert describe_narrowness(["prose", "math", "code", "web-zh"]) == ""
    assert describe_narrowness([]) == ""  # no calibration at all


def test_fidelity_text_of_calibrated_kinds_is_reported() -> None:
    text = {"prose": 100, "math": 100, "web-zh": 50}
    sentence = describe_exposure(text, {"prose", "math"})
    assert "20% is of kinds that calibration did not have (web-zh), expected at least 50%" in (
        sentence
    )
    assert describe_exposure(text, {"web-zh"}) == ""
    assert describe_exposure(text, set()) == ""
    assert describe_exposure({}, {"web-zh"}) == ""  # fidelity: none
    assert compute_unseen_share({}, {"prose"}) == 0.0


def test_unseen_parts_get_half_and_keep_their_proportions() -> None:
    shares = {"a": 0.4, "b": 0.4, "c": 0.15, "d": 0.05}
    labels = {"a": "prose", "b": "math", "c": "web-zh", "d": "web-de"}
    raised = raise_unseen_share(shares, labels, {"prose", "math"})
    assert raised == pytest.approx({"a": 0.25, "b": 0.25, "c": 0.375, "d": 0.125})
    assert raise_unseen_share(shares, labels, {"prose"}) == shares  # 60 % already
    assert raise_unseen_share(shares, labels, set()) == shares
    assert raise_unseen_share(shares, labels, set(labels.values())) == shares


def test_fidelity_mixture_is_sampled_with_raised_shares(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(" ".join([name] * 20_000), encoding="utf-8")
    parts = "".join(
        f"  - {{name: {name}, kind: {name}, licence: MIT, file: {name}.txt}}\n" for name in "abc"
    )
    path = tmp_path / "m.yaml"
    path.write_text(f"version: 2\nname: m\nparts:\n{parts}", encoding="utf-8")
    corpus = load_set(str(path), tmp_path)
    even = sample_sequences(corpus, WordTokenizer(), 60, 50, 0)
    raised = sample_sequences(corpus, WordTokenizer(), 60, 50, 0, {"a", "b"})
    assert [even.domains.count(name) for name in "abc"] == [20, 20, 20]
    assert [raised.domains.count(name) for name in "abc"] == [15, 15, 30]


def test_small_kinds_of_a_text_with_many_labels_are_pooled_over_languages() -> None:
    kinds = ("prose", "web", "chat", "math")
    labels = [f"{kind}-{code}" for kind in kinds for code in ("de", "zh", "ko")] + ["web", "docs"]
    lengths = [300] * 12 + [2000, 5000]
    calibrated = {label for label in labels if not label.endswith("-ko")} - {"docs"}
    pooled = pool_small_kinds(labels, lengths, calibrated)
    assert pooled[:6] == (
        "prose-mul", "prose-mul", "prose-other", "web-mul", "web-mul", "web-other"
    )  # fmt: skip
    assert pooled[-2:] == ("web", "docs")  # enough tokens of their own
    few = pool_small_kinds(labels[:12], lengths[:12], calibrated)
    assert few == tuple(labels[:12])  # few labels stay as they are


def test_many_labels_are_shown_by_kind() -> None:
    labels = [f"chat-{number}" for number in range(12)]
    assert format_labels(["web", "chat-de"]) == "web, chat-de"
    assert format_labels(["prose", *labels]) == "prose, chat (12 languages)"
