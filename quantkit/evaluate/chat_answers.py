"""Answers of a conversation, read as the task's plain form has them.

A chat model writes code into a fence, repeats the function that it is asked to complete, and writes
numbers for people ($1,000.00). Scored as a continuation, such answers are wrong for their form
alone. Each way of reading has a name, which the results carry.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Literal

ChatAnswer = Literal["text", "number", "code"]

VARIANTS: dict[ChatAnswer, str] = {
    "text": "chat, answers as they are",
    "number": "chat, numbers without currency, separators and trailing zeros",
    "code": "chat, code from the fence",
}
"""How answers are read -> the name of the variant in the results."""

_FENCE = re.compile(
    r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.M | re.S
)
_PYTHON = frozenset({"", "python", "python3", "py"})
_NUMBER = re.compile(
    r"(?<![\w.,])[-+]?(?:[$€£]|\\\$)?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\w,])"
    r"|(?<![\w.,])[-+]?(?:[$€£]|\\\$)?\d+(?:\.\d+)?(?![\w,])"
)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_MARKS = re.compile(r"\*\*|__|`")
_DEFINITION = re.compile(r"^(?:async[ \t]+)?def[ \t]+(\w+)", re.M)
_INDENT = "    "


def read_number_answer(text: str) -> str:
    """Return an answer with its numbers as a program writes them: "$1,000.00" is "1000".

    Bold and code marks and LaTeX's \\boxed are removed.
    """
    return _NUMBER.sub(_plain_number, _MARKS.sub("", _BOXED.sub(r"\1", text)))


def _plain_number(match: re.Match[str]) -> str:
    digits = re.sub(r"[^\d.+-]", "", match[0])
    whole, _, decimals = digits.partition(".")
    return f"{whole}.{decimals}" if decimals.strip("0") else whole


def extract_code(text: str) -> str:
    """Return the code of an answer: the first fence that defines something, else the first.

    An answer without a fence is returned as it is; a fence that does not end goes to the end.
    """
    blocks = [block for _, language, block in _FENCE.findall(text) if language.lower() in _PYTHON]
    if not blocks:
        return text
    chosen: str = next((block for block in blocks if _DEFINITION.search(block)), blocks[0])
    return chosen


def make_completion(text: str, head: str) -> str:
    """Return what follows `head`, the program before the completion, for an answer in chat form.

    A head that ends in a function's signature or docstring is continued: by the function's body,
    whose lost indentation is restored, or by the whole function again, which then replaces it.
    """
    code = textwrap.dedent(extract_code(text)) if "```" in text or "~~~" in text else text
    names = _DEFINITION.findall(head)
    if not names:
        return code
    if names[-1] in _DEFINITION.findall(code):
        return f"\n{_INDENT}pass\n\n{code}"
    return "\n" + restore_indent(code.strip("\n").split("\n"))


def restore_indent(lines: Sequence[str]) -> str:
    """Return the body of a function with an indentation.

    Chat templates strip an answer, so that the first line has lost it, or all lines have none.
    """
    first, *rest = lines
    rest_indents = [len(line) - len(line.lstrip()) for line in rest if line.strip()]
    if first.startswith((" ", "\t")):
        return "\n".join(lines)
    if rest_indents and min(rest_indents) > 0:  # only the first line has lost it
        return "\n".join((" " * min(rest_indents) + first, *rest))
    return "\n".join(_INDENT + line if line.strip() else line for line in lines)
