"""Answers of a conversation, read as the task's plain form has them.

A chat model writes code into a fence, repeats the function that it is asked to complete, and writes
numbers for people ($1,000.00). Scored as a continuation, such answers are wrong for their form
alone. Each way of reading has a name, which the results carry.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
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
_CURRENCY = r"(?:[$€£]|\\\$)"
_SIGN = rf"(?:[-+]?{_CURRENCY}*|{_CURRENCY}+[-+])"
_NUMBER = re.compile(
    rf"(?<![\w.,]){_SIGN}\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?(?![\w,])"
    rf"|(?<![\w.,]){_SIGN}\d+(?:\.\d+)?(?![\w,])"
)
_LATEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|\\[,!])(?=\d{3}(?!\d))")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_MARKS = re.compile(r"\*\*|__|`")
_DEFINITION = re.compile(r"^(?:async[ \t]+)?def[ \t]+(\w+)", re.M)
_MARK_LINES = re.compile(r"\A(?:\s*\[/?[A-Z]+\][ \t]*\n)+|(?:\n[ \t]*\[/?[A-Z]+\]\s*)+\Z")
_INDENT = "    "


def read_number_answer(text: str) -> str:
    """Return an answer with its numbers as a program writes them: "$1,000.00" is "1000".

    Bold and code marks, LaTeX's \\boxed and its separators of thousands are removed.
    """
    plain = _BOXED.sub(r"\1", _LATEX_COMMA.sub("", text))
    return _NUMBER.sub(_plain_number, _MARKS.sub("", plain))


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
    Marks of a prompt's examples around an answer, such as [BEGIN] and [DONE], are removed.
    """
    code = _MARK_LINES.sub("", text)
    if "```" in code or "~~~" in code:
        code = textwrap.dedent(_MARK_LINES.sub("", extract_code(code)))
    names = _DEFINITION.findall(head)
    if not names:
        return code
    if names[-1] in _DEFINITION.findall(code):
        return f"\n{_INDENT}pass\n\n{code}"
    return "\n" + restore_indent(code.strip("\n").split("\n"), head)


def restore_indent(lines: Sequence[str], head: str) -> str:
    """Return the body of a function with an indentation that continues `head`.

    A body in a fence has lost the indentation of the function in all lines; a chat template that
    strips an answer removes it from the first line alone. The form that is Python is returned.
    """
    own = _read_indent(head)
    first, *rest = lines
    if first.startswith((" ", "\t")):
        return "\n".join(lines)
    shifted = "\n".join(own + line if line.strip() else line for line in lines)
    stripped = "\n".join((own + first, *rest))
    forms = (shifted, stripped)
    return next((form for form in forms if is_python(f"{head}\n{form}")), shifted)


def _read_indent(head: str) -> str:
    """Return the indentation of the body that a head ends in: that of its docstring, if any."""
    last = next((line for line in reversed(head.split("\n")) if line.strip()), "")
    return last[: len(last) - len(last.lstrip())] or _INDENT


def is_python(source: str) -> bool:
    """Return whether text is a Python program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in generated text are no fault
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
