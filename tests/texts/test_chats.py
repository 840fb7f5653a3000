"""Chats: rows with messages, the model's template, the tokens that count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from quantkit.build.hidden_states import sort_by_length
from quantkit.errors import CalibrationError
from quantkit.evaluate.token_fidelity import select_scored_rows
from quantkit.io import package_data
from quantkit.report.make import NO_CHAT_TEMPLATE, summarize_text
from quantkit.texts.chats import cut_chats, read_chats
from quantkit.texts.corpora import CorpusSet, load_set, load_tokenizer, sample_sequences

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAST_ONLY = (
    "{% for message in messages %}"
    "{% if message.role != 'assistant' or loop.last %}<{{ message.role }}>{{ message.content }}</>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TWO_TURNS = (
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(package_data.locate_model("builtin:tiny-v3"))


@pytest.fixture
def chat_tokenizer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def decode_answers(tokenizer: Any, row: tuple[list[int], tuple[tuple[int, int], ...]]) -> list[str]:
    ids, answers = row
    return [tokenizer.decode(ids[start:end]) for start, end in answers]


def write_chats(folder: Path, count: int) -> CorpusSet:
    """Write a set of `count` chats, each after the same prompt of 5 words."""
    rows = [
        [
            {"role": "user", "content": "question " * 5},
            {"role": "assistant", "content": f"answer {n}"},
        ]
        for n in range(count)
    ]
    lines = [json.dumps({"turns": row}) for row in rows]
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    spec = (
        "version: 2\nname: talk\nparts:\n  - {name: c, kind: chat, licence: MIT, "
        "file: chats.jsonl, messages: turns, packing: chats}\n"
    )
    (folder / "talk.yaml").write_text(spec, encoding="utf-8")
    return load_set(str(folder / "talk.yaml"), folder)


def test_answers_are_the_tokens_after_the_generation_prompt(chat_tokenizer: Any) -> None:
    [row] = cut_chats([TWO_TURNS], chat_tokenizer, 4096)
    assert decode_answers(chat_tokenizer, row) == ["first answer</>", "second answer</>"]
    whole = chat_tokenizer.decode(row[0])
    assert whole.startswith("<user>first question</><assistant>first answer</><user>second")


def test_messages_after_the_last_answer_are_left_out(chat_tokenizer: Any) -> None:
    [row] = cut_chats([TWO_TURNS[:3]], chat_tokenizer, 4096)
    assert "second question" not in chat_tokenizer.decode(row[0])


def test_template_that_drops_earlier_answers_leaves_the_last(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", LAST_ONLY)
    [row] = cut_chats([TWO_TURNS], tokenizer, 4096)
    assert decode_answers(tokenizer, row) == ["second answer</>"]


def test_answers_end_at_the_length_and_chats_without_any_are_left_out(chat_tokenizer: Any) -> None:
    [(ids, answers)] = cut_chats([TWO_TURNS], chat_tokenizer, 4096)
    start = answers[0][0]
    [(cut, ranges)] = cut_chats([TWO_TURNS], chat_tokenizer, start + 2)
    assert cut == ids[: start + 2] and ranges == ((start, start + 2),)
    assert cut_chats([TWO_TURNS], chat_tokenizer, start) == []


def test_model_without_template_joins_messages_by_blank_lines(
    tokenizer: Any, tmp_path: Path
) -> None:
    [row] = cut_chats([TWO_TURNS], tokenizer, 4096)
    assert tokenizer.decode(row[0]).count("\n\n") == 3
    assert decode_answers(tokenizer, row) == ["first answer", "second answer"]
    corpus = write_chats(tmp_path, 200)
    tokens = sample_sequences(corpus, tokenizer, 1, 200, 0)
    for has_template in (True, False):
        [part] = summarize_text(corpus, tokens, 64, 0, has_template=has_template).parts
        assert (NO_CHAT_TEMPLATE in part.description) is not has_template


def test_failing_template_is_one_sentence(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no roles') }}")
    with pytest.raises(CalibrationError, match="chat template: expected the text of a conv.*roles"):
        cut_chats([TWO_TURNS], tokenizer, 64)


def test_share_counts_answers_alone(chat_tokenizer: Any, tmp_path: Path) -> None:
    corpus = write_chats(tmp_path, 200)
    tokens = sample_sequences(corpus, chat_tokenizer, 4, 100, 0)
    [part] = summarize_text(corpus, tokens, 100, 0).parts
    assert part.answers is not None and 400 <= part.answers < 420 < part.tokens
    assert tokens.hash == sample_sequences(corpus, chat_tokenizer, 4, 100, 0).hash
    assert tokens.hash != sample_sequences(corpus, chat_tokenizer, 4, 100, 1).hash


def test_only_answers_are_scored(chat_tokenizer: Any, tmp_path: Path) -> None:
    """The rows that are scored are those before each token of an answer."""
    tokens = sort_by_length(sample_sequences(write_chats(tmp_path, 200), chat_tokenizer, 2, 200, 0))
    stream = type("Stream", (), {"tokens": tokens, "text_rows": tokens.n_tokens})()
    rows, domains = select_scored_rows(cast(Any, stream))
    expected = [
        start + position - 1
        for start, answers in zip(tokens.starts, tokens.answers, strict=True)
        for first, end in answers or ()
        for position in range(first, end)
    ]
    assert rows.tolist() == expected and set(domains) == {"chat"}
    answers = chat_tokenizer.decode(tokens.ids[torch.tensor(expected) + 1].tolist())
    assert "question" not in answers and answers.startswith("answer ")


def test_sharegpt_rows_are_read_and_rows_without_answer_are_counted() -> None:
    rows: list[dict[str, Any]] = [
        {"c": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"c": [{"from": "human", "value": "a"}]},
        {"c": None},
        {"c": [{"role": "assistant", "content": " "}]},
    ]
    chats, skipped = read_chats(rows, "c", "file", 10)
    assert chats == [({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})]
    assert skipped == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": []}, r"f: row 1: expected the column 'c' of `messages`, found 'x'"),
        ({"c": "text"}, r"f: row 1: c: expected a list of messages, found 'text'"),
        ({"c": [3]}, r"f: row 1: c: message 1: expected a role .* found 3"),
        ({"c": [{"role": "tool", "content": "x"}]}, r"message 1: expected a role"),
        ({"c": [{"role": "user", "content": ["x"]}]}, r"message 1: expected a role"),
        ({"c": [{"role": "user", "content": "\ud800"}]}, r"message 1: expected a role"),
        ({"c": [{"role": ["user"], "content": "x"}]}, r"message 1: expected a role"),
    ],
)
def test_faults_name_row_and_message(row: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_chats([row], "c", "f", 10)


@pytest.mark.parametrize(
    "keys", ["packing: chats", "messages: c", "messages: c, packing: documents"]
)
def test_messages_and_packing_belong_together(tmp_path: Path, keys: str) -> None:
    (tmp_path / "a.jsonl").write_text("{}", encoding="utf-8")
    spec = f"version: 2\nname: m\nparts:\n  - {{name: c, kind: chat, licence: MIT, {keys}, "
    (tmp_path / "m.yaml").write_text(spec + "file: a.jsonl}\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match="together with `packing: chats`, found"):
        load_set(str(tmp_path / "m.yaml"), tmp_path)
