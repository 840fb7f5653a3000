"""A model's chat template, rendered with limits (io/templates.py) to the text of transformers.

The template comes with the model and is untrusted code. transformers renders it in a sandbox
that bounds neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from quantkit.io.templates import TemplateFault, TemplateWorker

Message = Mapping[str, object]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_PROBE = "part-of-text"
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # text that no template strips or changes


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that chat templates need."""

    @property
    def special_tokens_map(self) -> Mapping[str, object]: ...

    def get_chat_template(
        self, chat_template: str | None = None, tools: list[object] | None = None
    ) -> str: ...


def render_chat(
    worker: TemplateWorker,
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    settings: Mapping[str, object] | None = None,
    tools: Sequence[object] = (),
) -> str:
    """Return a conversation as text that ends where the assistant's next message begins.

    template: replaces the tokenizer's; settings: further names that the template may read; tools:
    JSON schemas of functions that the model may call. Raises ValueError if there is no template,
    TemplateFault if it gives no text.
    """
    text = tokenizer.get_chat_template(template, list(tools) or None)
    values = _make_values(tokenizer, messages, settings or {}, tools)
    return worker.render(text, values | {"add_generation_prompt": True}, "chat")


def render_finished_chat(
    worker: TemplateWorker,
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[object] = (),
) -> str:
    """Return a conversation as text that ends after its last message.

    tools: as in `render_chat`. Raises ValueError if there is no template, TemplateFault if it gives
    no text.
    """
    values = _make_values(tokenizer, messages, {}, tools)
    text = tokenizer.get_chat_template(None, list(tools) or None)
    return worker.render(text, values | {"add_generation_prompt": False}, "chat")


def reads_parts(worker: TemplateWorker, tokenizer: ChatTokenizer) -> bool:
    """Return whether the template reads content that is a list of parts; others write the list, or
    refuse it. Raises as `render_chat`, but not if the template refuses.
    """
    part = {"type": "text", "text": _PROBE}
    try:
        text = render_chat(worker, tokenizer, [{"role": "user", "content": [part]}])
    except TemplateFault as fault:
        if fault.is_limit:
            raise
        return False
    return _PROBE in text and not any(f"{mark}type{mark}" in text for mark in ("'", '"'))


def render_unfinished_chat(
    worker: TemplateWorker,
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> str:
    """Return a conversation as text whose last message stays open: the model continues it.

    Raises ValueError if there is no template, TemplateFault if it gives no text or drops the last
    message.
    """
    text = tokenizer.get_chat_template(template)
    content = str(messages[-1].get("content", ""))
    tagged = [*messages[:-1], {**messages[-1], "content": content + _CONTINUE_TAG}]
    values = _make_values(tokenizer, tagged, settings or {})
    rendered = worker.render(text, values | {"add_generation_prompt": False}, "chat")
    before, tag, after = rendered.rpartition(_CONTINUE_TAG.strip())
    if not tag or content.strip() not in rendered:
        raise TemplateFault("expected the last message in its text, found none", is_limit=False)
    # a template that strips messages also strips the end of an open one
    return before if after.startswith(" ") else before.rstrip()


def render_prompt(
    worker: TemplateWorker,
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    is_finished: bool,
    template: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> str:
    """Return a benchmark's conversation as text, as lm-eval asks transformers for it.

    is_finished: the assistant's message begins after the text; otherwise it continues the last
    message. A template that refuses system messages gets the others. Raises as `render_chat`.
    """
    render = render_chat if is_finished else render_unfinished_chat
    try:
        return render(worker, tokenizer, messages, template=template, settings=settings)
    except TemplateFault as fault:
        others = [message for message in messages if message["role"] != "system"]
        if fault.is_limit or len(others) == len(messages):
            raise
        return render(worker, tokenizer, others, template=template, settings=settings)


def _make_values(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    settings: Mapping[str, object],
    tools: Sequence[object] = (),
) -> dict[str, object]:
    """Return the names that a template can read."""
    return {
        **tokenizer.special_tokens_map,
        **settings,
        "messages": [_complete_message(message) for message in messages],
        "tools": list(tools) or None,
        "documents": None,
    }


def _complete_message(message: Message) -> dict[str, object]:
    """Return a message without empty keys, its reasoning under the names that templates read."""
    values = {key: value for key, value in message.items() if value is not None}
    reasoning = next((values[key] for key in REASONING_KEYS if key in values), None)
    if reasoning is not None:
        values = {"thinking": reasoning, **values, "reasoning_content": reasoning}
    return values
