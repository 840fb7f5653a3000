"""Conversations: rows with messages, and their token sequences through the model's chat template.

Only the tokens of the assistant's messages count, because the model writes them. The prompts are
part of the sequence, since answers attend to them. The chat template decides which roles and keys a
message may have: tool calls, tool results and reasoning reach it as transformers passes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from quantkit.errors import CalibrationError
from quantkit.io.files import is_encodable, shorten_repr
from quantkit.io.templates import TemplateFault, TemplateWorker
from quantkit.texts.chat_templates import (
    REASONING_KEYS,
    ChatTokenizer,
    Message,
    reads_parts,
    render_chat,
    render_finished_chat,
)

ASSISTANT = "assistant"
SHAREGPT_ROLES = {"human": "user", "gpt": ASSISTANT, "observation": "tool"}
TOOLS_COLUMN = "tools"
"""Next to the messages: JSON schemas of functions, or their JSON text; as transformers names it."""
ANSWER_KEYS = ("tool_calls", *REASONING_KEYS)
"""Keys of an assistant's message that are part of its answer, next to the content."""
PLAIN_JOIN = "\n\n"
"""Between the messages of a chat in the text of a model without a chat template."""

Segment = tuple[str, bool]
"""A piece of a rendered chat, and whether it is the assistant's."""


class Encoder(Protocol):
    """The part of a transformers tokenizer that turns text into ids."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, list[list[int]]]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation, and the JSON schemas of the functions that the model may call in it."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = ()


class _UnreadableChat(Exception):
    """The reason why a cell is no chat; messages put the place in front."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CutChats:
    """Chats as tokens: the ids of each, and the ranges of its answers' tokens.

    refused: chats that the model's chat template refuses; reason: why it refuses the first.
    """

    rows: tuple[tuple[list[int], tuple[tuple[int, int], ...]], ...]
    refused: int = 0
    reason: str = ""


def read_chats(
    rows: Iterable[Mapping[str, Any]],
    column: str,
    where: str,
    limit: int,
    *,
    skip_unreadable: bool = False,
) -> tuple[list[Chat], int]:
    """Return at most `limit` chats of a column, and the number of rows that give none.

    A cell is a list of {"role": ..., "content": ...}, or of ShareGPT's {"from": ..., "value": ...}.
    Other keys of a message stay for the chat template, and so does the row's column `tools`. Raises
    CalibrationError with row and message for anything else; with skip_unreadable such rows are
    counted.
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
        try:
            chat = Chat(
                messages=_read_messages(cell, column), tools=_read_tools(row.get(TOOLS_COLUMN))
            )
        except _UnreadableChat as fault:
            if skip_unreadable:
                skipped += 1
                continue
            raise CalibrationError(
                f"{place}: {fault}. Correct the row, or use `refused: skip`"
            ) from None
        if any(map(_is_answer, chat.messages)):
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


def _is_answer(message: Message) -> bool:
    """Return whether a message is the assistant's and not empty."""
    if message["role"] != ASSISTANT:
        return False
    has_text = bool(join_content(message.get("content")).strip())
    return has_text or any(message.get(key) for key in ANSWER_KEYS)


def join_content(content: object) -> str:
    """Return the text of a message's content; parts are joined, no content is ""."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def _read_content(content: object) -> object:
    """Return a message's content: text, or None; parts as transformers' templates expect them.

    Raises _UnreadableChat for anything else, such as an image.
    """
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise _UnreadableChat(f"expected content as text, found {shorten_repr(content)}")
    return [{"type": "text", "text": text} for text in texts]


def _read_messages(cell: object, column: str) -> tuple[Message, ...]:
    """Return the messages of a cell, none of an empty one; raises _UnreadableChat."""
    try:
        return tuple(_iterate_messages(cell)) if cell is not None else ()
    except _UnreadableChat as fault:
        raise _UnreadableChat(f"{column}: {fault}") from None


def _read_tools(cell: object) -> tuple[Mapping[str, object], ...]:
    """Return the tools of a cell: a list of objects, or its JSON text; none of an empty one.

    Raises _UnreadableChat.
    """
    tools = cell
    if isinstance(cell, str) and cell.strip():
        try:
            tools = json.loads(cell)
        except (ValueError, RecursionError):
            tools = cell
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return ()
    if not isinstance(tools, list) or not all(isinstance(x, Mapping) for x in tools):
        raise _UnreadableChat(
            f"{TOOLS_COLUMN}: expected a list of JSON schemas of functions, found "
            f"{shorten_repr(cell)}"
        )
    _check_text(tools, TOOLS_COLUMN)
    return tuple(tools)


def _check_text(value: object, where: str) -> None:
    """Raise _UnreadableChat if a value holds text that no tokenizer takes."""
    if not is_encodable(json.dumps(value, ensure_ascii=False, default=str)):
        raise _UnreadableChat(
            f"{where}: expected text, found half a surrogate pair (\\ud800 to \\udfff)"
        )


def _iterate_messages(cell: object) -> Iterator[Message]:
    """Yield the messages of a cell under the names role and content; raises _UnreadableChat."""
    if not isinstance(cell, Sequence) or isinstance(cell, str):
        raise _UnreadableChat(f"expected a list of messages, found {shorten_repr(cell)}")
    for number, entry in enumerate(cell, start=1):
        where = f"message {number}"
        role = entry.get("role", entry.get("from")) if isinstance(entry, Mapping) else None
        if not isinstance(role, str) or not role.strip():
            raise _UnreadableChat(
                f"{where}: expected a role (system, user, assistant, tool, ...) as text, found "
                f"{shorten_repr(entry)}"
            )
        try:
            content = _read_content(entry.get("content", entry.get("value")))
        except _UnreadableChat as fault:
            raise _UnreadableChat(f"{where}: {fault}") from None
        others = {str(k): v for k, v in entry.items() if k not in {"role", "from", "value"}}
        message = {**others, "role": SHAREGPT_ROLES.get(role, role), "content": content}
        message = {key: value for key, value in message.items() if value is not None}
        _check_text(message, where)
        yield message


def cut_chats(
    chats: Sequence[Chat],
    tokenizer: Any,
    length: int,
    *,
    count_all: bool = False,
    skip_refused: bool = False,
) -> CutChats:
    """Return the ids of each chat, at most `length`, and the ranges of its answers' tokens.

    A chat without an answer in its first `length` tokens is left out; with `count_all` every token
    is in a range, and the chat stays. A model without a chat template gets the contents of the
    messages joined by blank lines. Raises CalibrationError if the model's template refuses a chat;
    with `skip_refused` such chats are counted. A template over its limits is always an error.
    """
    pieces, reasons = list[list[Segment]](), list[str]()
    if not has_chat_template(tokenizer):
        pieces = [_join_messages(chat) for chat in chats]
    else:
        with TemplateWorker() as worker:
            try:
                has_parts = reads_parts(worker, tokenizer)
                for chat in chats:
                    try:
                        pieces.append(_render_segments(worker, tokenizer, chat, has_parts))
                    except TemplateFault as fault:
                        if fault.is_limit or not skip_refused:
                            raise
                        reasons.append(str(fault))
            except TemplateFault as fault:
                raise _make_template_error(fault) from fault
    rows = [_encode_segments(tokenizer, segments, length) for segments in pieces]
    if count_all:
        rows = [(ids, ((0, len(ids)),) if ids else ()) for ids, _ in rows]
    rows = [row for row in rows if row[1]]
    return CutChats(rows=tuple(rows), refused=len(reasons), reason=next(iter(reasons), ""))


def _make_template_error(fault: TemplateFault) -> CalibrationError:
    """Return the error for a chat that the model's chat template refuses."""
    advice = (
        "Correct the model's chat template"
        if fault.is_limit
        else "Correct the rows or the chat template, or leave such chats out with `refused: skip`"
    )
    sentence = str(fault).rstrip(".")
    return CalibrationError(
        f"chat template: expected the text of a conversation, found: {sentence}. {advice}"
    )


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether the model has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _join_messages(chat: Chat) -> list[Segment]:
    pieces = [(join_content(x.get("content")), x["role"] == ASSISTANT) for x in chat.messages]
    pieces = [piece for piece in pieces if piece[0]]  # a call of a tool has no text
    return [piece for pair in pieces for piece in (pair, (PLAIN_JOIN, False))][:-1]


def _render_segments(
    worker: TemplateWorker, tokenizer: ChatTokenizer, chat: Chat, has_parts: bool
) -> list[Segment]:
    """Return the rendered chat in segments; later turns must not change the text of earlier ones.

    A template that changes earlier turns (one that drops their reasoning, say) leaves the last
    answer as the only one that counts. has_parts: whether it reads content in parts; others get
    their text. Raises TemplateFault.
    """
    answers = [n for n, x in enumerate(chat.messages) if x["role"] == ASSISTANT]
    messages, tools = chat.messages[: answers[-1] + 1], chat.tools
    if not has_parts:
        messages = tuple(
            {**x, "content": join_content(x["content"])} if "content" in x else x for x in messages
        )
    whole = render_finished_chat(worker, tokenizer, messages, tools=tools)
    spans = list[tuple[int, int]]()
    for index in answers:
        before = _render_before(worker, tokenizer, replace(chat, messages=messages[:index]))
        after = render_finished_chat(worker, tokenizer, messages[: index + 1], tools=tools)
        if whole.startswith(before) and whole.startswith(after):
            spans.append((len(before), len(after)))
    segments, start = list[Segment](), 0
    for first, last in spans:
        segments += [(whole[start:first], False), (whole[first:last], True)]
        start = last
    return segments


def _render_before(worker: TemplateWorker, tokenizer: ChatTokenizer, chat: Chat) -> str:
    """Return what the model reads before an answer; nothing if it begins the chat and the template
    needs a message. Raises TemplateFault.
    """
    try:
        return render_chat(worker, tokenizer, chat.messages, tools=chat.tools)
    except TemplateFault as fault:
        if chat.messages or fault.is_limit:
            raise
        return ""


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
