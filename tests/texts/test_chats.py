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
from quantkit.texts.chats import Chat, cut_chats, read_chats
from quantkit.texts.corpora import (
    CorpusSet,
    describe_left_out,
    load_set,
    load_tokenizer,
    sample_sequences,
)

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAST_ONLY = (
    "{% for message in messages %}"
    "{% if message.role != 'assistant' or loop.last %}<{{ message.role }}>{{ message.content }}</>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TWO_TURNS = Chat(
    messages=(
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "second question"},
        {"role": "assistant", "content": "second answer"},
    )
)


IMAGE = {"type": "image", "image": "x"}
TOOLS = """\
{%- for message in messages -%}
<{{ message.role }}>
{%- if message.reasoning_content %}[{{ message.reasoning_content }}]{% endif -%}
{%- if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}({{ part.text }}){% endfor %}{% endif -%}
{%- for call in message.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}
{%- endfor -%}</>
{%- endfor -%}
{%- if add_generation_prompt %}<assistant>{% endif -%}
"""
"""A template that reads parts, reasoning, and calls of tools."""
STRICT = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}<{{ m.role }}>{{ m.content }}</>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
AGENT = [
    {"role": "developer", "content": [{"type": "text", "text": "short"}, {"text": "words"}]},
    {"role": "user", "content": "sum", "name": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "3"},
    {"role": "assistant", "content": "three", "reasoning_content": "one and two"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(package_data.locate_model("builtin:tiny-v3"))


@pytest.fixture
def chat_tokenizer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


def cut(chats: list[Any], tokenizer: Any, length: int) -> list[Any]:
    return list(cut_chats(chats, tokenizer, length).rows)


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
    [row] = cut([TWO_TURNS], chat_tokenizer, 4096)
    assert decode_answers(chat_tokenizer, row) == ["first answer</>", "second answer</>"]
    whole = chat_tokenizer.decode(row[0])
    assert whole.startswith("<user>first question</><assistant>first answer</><user>second")


def test_messages_after_the_last_answer_are_left_out(chat_tokenizer: Any) -> None:
    [row] = cut([Chat(messages=TWO_TURNS.messages[:3])], chat_tokenizer, 4096)
    assert "second question" not in chat_tokenizer.decode(row[0])


def test_template_that_drops_earlier_answers_leaves_the_last(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", LAST_ONLY)
    [row] = cut([TWO_TURNS], tokenizer, 4096)
    assert decode_answers(tokenizer, row) == ["second answer</>"]


def test_answers_end_at_the_length_and_chats_without_any_are_left_out(chat_tokenizer: Any) -> None:
    [(ids, answers)] = cut([TWO_TURNS], chat_tokenizer, 4096)
    start = answers[0][0]
    [(shorter, ranges)] = cut([TWO_TURNS], chat_tokenizer, start + 2)
    assert shorter == ids[: start + 2] and ranges == ((start, start + 2),)
    assert cut([TWO_TURNS], chat_tokenizer, start) == []


def test_model_without_template_joins_messages_by_blank_lines(
    tokenizer: Any, tmp_path: Path
) -> None:
    [row] = cut([TWO_TURNS], tokenizer, 4096)
    assert tokenizer.decode(row[0]).count("\n\n") == 3
    assert decode_answers(tokenizer, row) == ["first answer", "second answer"]
    corpus = write_chats(tmp_path, 200)
    tokens = sample_sequences(corpus, tokenizer, 1, 200, 0)
    for has_template in (True, False):
        [part] = summarize_text(corpus, tokens, 64, 0, has_template=has_template).parts
        assert (NO_CHAT_TEMPLATE in part.description) is not has_template


def test_tools_and_reasoning_reach_the_template_as_in_transformers(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TOOLS)
    chats, skipped = read_chats([{"c": AGENT}], "c", "f", 10)
    [row] = cut(chats, tokenizer, 4096)
    expected = tokenizer.apply_chat_template(AGENT, tokenize=False)
    assert "(short)(words)" in expected and skipped == 0
    assert tokenizer.decode(row[0]) == expected
    assert decode_answers(tokenizer, row) == [
        'add{"a": 1, "b": 2}</>',
        "[one and two]three</>",
    ]


@pytest.mark.parametrize("is_text", [False, True])
def test_tools_of_a_row_reach_the_template_as_in_transformers(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_text: bool
) -> None:
    """Also a model with a template of its own for tools, and datasets that store JSON text."""
    listing = "{% for tool in tools or [] %}[{{ tool | tojson }}]{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", {"default": TOOLS, "tool_use": listing + TOOLS})
    schema = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    cell = json.dumps([schema]) if is_text else [schema]
    rows = [{"messages": AGENT, "tools": cell}, {"messages": AGENT, "tools": "[]"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    [part] = load_set(str(path), tmp_path).parts
    first, second = cut([*part.chats], tokenizer, 4096)
    expected = tokenizer.apply_chat_template(AGENT, tools=[schema], tokenize=False)
    assert tokenizer.decode(first[0]) == expected and '"name": "add", "parameters"' in expected
    assert decode_answers(tokenizer, first) == decode_answers(tokenizer, second)
    assert tokenizer.decode(second[0]) == tokenizer.apply_chat_template(AGENT, tokenize=False)


def test_template_without_parts_gets_their_text(chat_tokenizer: Any) -> None:
    """transformers would write the list itself into the text."""
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    chats, _ = read_chats([{"c": [{"role": "assistant", "content": parts}]}], "c", "f", 1)
    [row] = cut(chats, chat_tokenizer, 4096)
    assert decode_answers(chat_tokenizer, row) == ["one two</>"]


def test_calls_of_tools_have_no_text_without_a_template(tokenizer: Any) -> None:
    chats, _ = read_chats([{"c": AGENT}], "c", "f", 1)
    [row] = cut(chats, tokenizer, 4096)
    assert tokenizer.decode(row[0]) == "shortwords\n\nsum\n\n3\n\nthree"
    assert decode_answers(tokenizer, row) == ["three"]


def test_chats_that_the_template_refuses_stop_or_are_counted(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", STRICT)
    chats, _ = read_chats([{"c": AGENT}, {"c": list(TWO_TURNS.messages)}], "c", "f", 10)
    with pytest.raises(CalibrationError, match="found: no role developer.*`refused: skip`"):
        cut_chats(chats, tokenizer, 64)
    cut = cut_chats(chats, tokenizer, 64, skip_refused=True)
    assert (len(cut.rows), cut.refused, cut.reason) == (1, 1, "no role developer")


def test_template_over_its_limits_is_not_skipped(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = "{% if messages | length > 1 %}{{ 'a' * 10**10 }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", slow)
    with pytest.raises(CalibrationError, match="MiB of memory"):
        cut_chats([TWO_TURNS], tokenizer, 64, skip_refused=True)


def test_refused_chats_are_counted_in_plan_and_report(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", STRICT)
    rows = [{"messages": row} for row in (AGENT, list(TWO_TURNS.messages), [{"role": "user"}])]
    rows.append({"messages": [{"role": "user", "content": [IMAGE]}]})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    corpus = load_set(f"{path}?refused=skip&count=all", tmp_path)
    tokens = sample_sequences(corpus, tokenizer, 1, 4, 0)
    assert describe_left_out(corpus, tokens, tokenizer) == (
        "a.jsonl: part text: 2 rows without an answer are skipped",
        "a.jsonl: part text: 1 chats that the model's chat template refuses are skipped",
    )
    [part] = summarize_text(corpus, tokens, 4, 0).parts
    assert part.skipped == 3


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
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert chats == [Chat(messages=messages)]
    assert skipped == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": []}, r"f: row 1: expected the column 'c' of `messages`, found 'x'"),
        ({"c": "text"}, r"f: row 1: c: expected a list of messages, found 'text'"),
        ({"c": [3]}, r"f: row 1: c: message 1: expected a role .* found 3"),
        ({"c": [{"role": " ", "content": "x"}]}, r"message 1: expected a role"),
        ({"c": [{"role": ["user"], "content": "x"}]}, r"message 1: expected a role"),
        ({"c": [{"role": "user", "content": ["x"]}]}, r"message 1: expected content as text, fo"),
        ({"c": [{"role": "user", "content": []}]}, r"message 1: expected content as text, found"),
        ({"c": [{"role": "user", "content": {"text": "x"}}]}, r"expected content as text"),
        ({"c": [{"role": "user", "content": [IMAGE]}]}, r"found \[{'type': 'image'.*refused: skip"),
        ({"c": [{"role": "user", "content": "\ud800"}]}, r"message 1: expected text, found half"),
        ({"c": [{"role": "user", "name": "\ud800"}]}, r"message 1: expected text, found half"),
        (
            {"c": [], "tools": "add"},
            r"row 1: tools: expected a list of JSON schemas .* found 'add'",
        ),
        ({"c": [], "tools": ["add"]}, r"row 1: tools: expected a list .* found \['add'\]"),
        ({"c": [], "tools": [{"x": "\ud800"}]}, r"row 1: tools: expected text, found half"),
    ],
)
def test_faults_name_row_and_message(row: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_chats([row], "c", "f", 10)
    if "c" in row:
        answered = {"c": list(TWO_TURNS.messages)}
        chats, skipped = read_chats([row, answered], "c", "f", 10, skip_unreadable=True)
        assert chats == [TWO_TURNS] and skipped == 1


@pytest.mark.parametrize(
    "keys", ["packing: chats", "messages: c", "messages: c, packing: documents"]
)
def test_messages_and_packing_belong_together(tmp_path: Path, keys: str) -> None:
    (tmp_path / "a.jsonl").write_text("{}", encoding="utf-8")
    spec = f"version: 2\nname: m\nparts:\n  - {{name: c, kind: chat, licence: MIT, {keys}, "
    (tmp_path / "m.yaml").write_text(spec + "file: a.jsonl}\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match="together with `packing: chats`, found"):
        load_set(str(tmp_path / "m.yaml"), tmp_path)
