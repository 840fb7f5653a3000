"""Seed prompts as text for a model: raw openings, and messages through its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.io.templates import TemplateFault, TemplateWorker
from quantkit.texts.chat_templates import render_chat, render_finished_chat, render_unfinished_chat
from quantkit.texts.corpora import find_prefix
from quantkit.texts.self_prompts import SeedPrompt

_THINK = ("<think>\n", "\n</think>\n\n")
"""Marks of reasoning for a template that leaves it out; most thinking models use them."""


class PromptRenderer:
    """Renders prompts and answers with a model's tokenizer; `where` names the model in errors."""

    def __init__(self, tokenizer: Any, worker: TemplateWorker, where: str) -> None:
        self.tokenizer, self._worker, self._where = tokenizer, worker, where

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def render_prompt(self, prompt: SeedPrompt) -> str:
        """Return the text that the model continues, without a BOS that the tokenizer adds.

        Raises CalibrationError if the chat template fails.
        """
        if prompt.form == "opening":
            return prompt.text
        return self._render([make_message(prompt)], "prompt")

    def render_answer(
        self, prompt: SeedPrompt, reasoning: str, answer: str, *, ended: bool
    ) -> tuple[str, int]:
        """Return a conversation with the answer of a server as text, and the length of its prompt.

        Reasoning is where the chat template puts it; a template that leaves it out gets it between
        think tags. ended: the model ended its answer, so that the end of the turn is part of the
        text.
        """
        start = self.render_prompt(prompt)
        message: dict[str, object] = {"role": "assistant", "content": answer}
        if reasoning:
            message["reasoning_content"] = reasoning
        if answer.strip():
            way = "finished" if ended else "unfinished"
            text = self._render([make_message(prompt), message], way)
            if reasoning.strip() in text:
                return text, min(len(start), len(text))
        opened, closed = _THINK
        joined = (
            f"{'' if start.rstrip().endswith('<think>') else opened}{reasoning.strip()}{closed}"
        )
        if not reasoning:
            joined = ""
        elif not answer.strip():  # cut while it was thinking
            joined = joined.removesuffix(closed)
        return start + joined + answer, len(start)

    def strip_bos(self, text: str) -> str:
        """Return a text without BOS, or the tokens that the tokenizer puts in front of it."""
        prefix = find_prefix(self.tokenizer)
        return text.removeprefix(self.tokenizer.decode(prefix)) if prefix else text

    def _render(self, messages: Sequence[dict[str, object]], way: str) -> str:
        values = (self._worker, self.tokenizer, messages)
        try:
            if way == "prompt":
                text = render_chat(*values)
            elif way == "finished":
                text = render_finished_chat(*values)
            else:
                text = render_unfinished_chat(*values)
            return self.strip_bos(text)
        except (TemplateFault, ValueError) as error:
            raise CalibrationError(
                f"{self._where}: chat template: expected text of a conversation, found: "
                f"{str(error):.300}. Correct the template, or choose another set"
            ) from None


def make_message(prompt: SeedPrompt) -> dict[str, object]:
    """Return a prompt as a user's message."""
    return {"role": "user", "content": prompt.text}
