"""Conversations: rows with messages, and their token sequences through the model's chat template.

Only the tokens of the assistant's messages count, because the model writes them. The prompts are
part of the sequence, since answers attend to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from quantkit.errors import CalibrationError
from quantkit.io.files import is_encodable, shorten_repr
from quantkit.io.templates import TemplateFault, TemplateWorker
from quantkit.texts.chat_templates import ChatTokenizer, render_chat, render_finished_chat

Message = Mapping[str, str]
Chat = tuple[Message, ...]
ROLES = ("system", "user", "assistant")
ROLE_NAMES = {"human": "user", "gpt": "assistant"}  # of data sets in ShareGPT's form
PLAIN_JOIN = "\n\n"
"""Between the messages of a chat in the text of a model without a chat template."""

Segment = tuple[str, bool]
"""A piece of a rendered chat, and whether it is the assistant's."""


class Encoder(Protocol):
    """The part of a transformers tokenizer that turns text into ids."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, list[list[int]]]: ...


def read_chats(
    rows: Iterable[Mapping[str, Any]], column: str, where: str, limit: int
) -> tuple[list[Chat], int]:
    """Return at most `limit` chats of a column, and the number of rows without an answer.

    A cell is a list of {"role": ..., "content": ...}, or of ShareGPT's {"from": ..., "value": ...}.
    Raises CalibrationError with row and message for anything else.
    """
    chats, skipped = list[Chat](), 0
    for number, row in enumerate(rows, start=1):
        if len(chats) >= limit:
            break
        place = f"{where}: row {number}"
        if column not in row:
            known = ", ".join(islice((shorten_repr(str(name)) for name in row), 12))
            raise CalibrationError(
                f"{place}: expected the column {column!r} of `messages`, found {known or 'none'}. "
                "Name the column with the messages"
            )
        cell = row[column]
        chat = tuple(_iterate_messages(cell, f"{place}: {column}")) if cell is not None else ()
        if any(message["role"] == "assistant" and message["content"].strip() for message in chat):
            chats.append(chat)
        else:
            skipped += 1
    return chats, skipped


def is_message_list(cell: object) -> bool:
    """Return whether a cell looks like a chat: a list of objects with a role."""
    return (
        isinstance(cell, list)
        and bool(cell)
        and all(isinstance(entry, Mapping) and ({"role", "from"} & {*entry}) for entry in cell)
    )


def read_content(content: object) -> object:
    """Return the text of a message; content in parts is joined if all of them are text."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content  # type: ignore[arg-type]


def _iterate_messages(cell: object, where: str) -> Iterator[Message]:
    """Yield the messages of a cell under the names role and content."""
    if not isinstance(cell, Sequence) or isinstance(cell, str):
        raise CalibrationError(f"{where}: expected a list of messages, found {shorten_repr(cell)}")
    for number, entry in enumerate(cell, start=1):
        values = entry if isinstance(entry, Mapping) else {}
        role = values.get("role", values.get("from"))
        content = read_content(values.get("content", values.get("value")))
        role = ROLE_NAMES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES or not isinstance(content, str) or not is_encodable(content):
            raise CalibrationError(
                f"{where}: message {number}: expected a role ({', '.join(ROLES)}) and content as "
                f"text, found {shorten_repr(entry)}. Remove rows of another kind from the file"
            )
        yield {"role": role, "content": content}


def cut_chats(
    chats: Sequence[Chat], tokenizer: Any, length: int, *, count_all: bool = False
) -> list[tuple[list[int], tuple[tuple[int, int], ...]]]:
    """Return the ids of each chat, at most `length`, and the ranges of its answers' tokens.

    A chat without an answer in its first `length` tokens is left out; with `count_all` every token
    is in a range, and the chat stays. A model without a chat
    template gets the messages joined by blank lines. Raises CalibrationError if the model's
    template fails.
    """
    if not has_chat_template(tokenizer):
        pieces = [_join_messages(chat) for chat in chats]
    else:
        with TemplateWorker() as worker:
            pieces = [_render_segments(worker, tokenizer, chat) for chat in chats]
    rows = (_encode_segments(tokenizer, segments, length) for segments in pieces)
    if count_all:
        return [(ids, ((0, len(ids)),)) for ids, _ in rows if ids]
    return [row for row in rows if row[1]]


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether the model has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _join_messages(chat: Chat) -> list[Segment]:
    pieces = [(message["content"], message["role"] == "assistant") for message in chat]
    return [piece for pair in pieces for piece in (pair, (PLAIN_JOIN, False))][:-1]


def _render_segments(worker: TemplateWorker, tokenizer: ChatTokenizer, chat: Chat) -> list[Segment]:
    """Return the rendered chat in segments; the text of earlier turns must stay as it was.

    A template that changes earlier turns (one that drops their reasoning, say) leaves the last
    answer as the only one that counts.
    """
    answers = [n for n, message in enumerate(chat) if message["role"] == "assistant"]
    chat = chat[: answers[-1] + 1]
    try:
        whole = render_finished_chat(worker, tokenizer, chat)
        spans = list[tuple[int, int]]()
        for index in answers:
            before = render_chat(worker, tokenizer, chat[:index])
            after = render_finished_chat(worker, tokenizer, chat[: index + 1])
            if whole.startswith(before) and whole.startswith(after):
                spans.append((len(before), len(after)))
    except TemplateFault as fault:
        raise CalibrationError(
            f"chat template: expected the text of a conversation, found: {fault}. Correct the "
            "model's chat template, or use `packing: documents` with a `template` for this part"
        ) from fault
    segments, start = list[Segment](), 0
    for first, last in spans:
        segments += [(whole[start:first], False), (whole[first:last], True)]
        start = last
    return segments


def _encode_segments(
    tokenizer: Encoder, segments: Sequence[Segment], length: int
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Tokenize prompts and answers apart, as an engine does, and cut them to `length` tokens."""
    texts = [text for text, _ in segments]
    encoded = (
        tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    )
    ids, answers = list[int](), list[tuple[int, int]]()
    for piece, (_, is_answer) in zip(encoded, segments, strict=True):
        start, end = len(ids), min(len(ids) + len(piece), length)
        if is_answer and start < end:
            answers.append((start, end))
        ids += piece
    return ids[:length], tuple(answers)
