"""Patterns over module names, and presets of rules. Pure."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from fnmatch import translate
from functools import cache
from typing import Literal

import regex

from quantkit.errors import UsageError

MAX_PATTERN = 1000
MATCH_SECONDS = 2
"""Time limit of a regular expression for one name; those of recipes take microseconds."""

Action = Literal["quantize", "keep"]

PRESETS: Mapping[str, tuple[tuple[str, Action], ...]] = {
    "experts-only": ((r"re:.*\.experts\.\d+\.[^.]+", "quantize"), ("*", "keep")),
    "all-linear": (("*", "quantize"),),
    "attention-source": (("*.self_attn.*", "keep"), ("*", "quantize")),
}
"""Preset -> (pattern, action): quantize with the default scheme, or keep as in the source."""


def find_pattern_fault(pattern: str) -> str | None:
    """Return why a pattern is invalid, or None."""
    if not pattern.removeprefix("re:").strip():
        return (
            "an empty pattern matches nothing; write a glob such as '*.mlp.*', or 're:' and a "
            "regular expression"
        )
    if len(pattern) > MAX_PATTERN:
        return f"a pattern has at most {MAX_PATTERN} characters, this one {len(pattern)}"
    if not pattern.startswith("re:"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "possible nested set" is legal
            re.compile(pattern[3:])
            regex.compile(pattern[3:])  # used by matches_module
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        return f"not a regular expression: {error}"
    return None


@cache  # looked up for each of 45,000 linears
def compile_expression(text: str) -> regex.Pattern[str]:
    """Compile a regular expression, once."""
    return regex.compile(text)


@cache  # fnmatchcase itself costs most of its time in looking this up
def compile_glob(pattern: str) -> re.Pattern[str]:
    """Compile a case-sensitive glob, once."""
    return re.compile(translate(pattern))


def matches_module(pattern: str, module: str) -> bool:
    """Return whether a pattern matches the whole name.

    `re:` marks a regular expression, other patterns are case-sensitive globs. Raises UsageError if
    the expression exceeds MATCH_SECONDS.
    """
    if pattern.startswith("re:"):
        try:
            return (
                compile_expression(pattern[3:]).fullmatch(module, timeout=MATCH_SECONDS) is not None
            )
        except TimeoutError:
            raise UsageError(
                f"rules: {pattern!r}: expected a result for {module!r} within {MATCH_SECONDS} "
                "seconds, found a timeout; write it without nested repeats"
            ) from None
    return compile_glob(pattern).match(module) is not None


def names_module(pattern: str, module: str) -> bool:
    """Return whether a pattern matches and spells out the last part of the name.

    '*.mlp.gate' does, '*.mlp.*' does not. In a regular expression the last part must be a whole
    word at the end of an alternative ('re:.*(gate|up)').
    """
    if not matches_module(pattern, module):
        return False
    last = re.escape(module.rpartition(".")[2])
    if not pattern.startswith("re:"):
        return re.search(rf"(?<!\w){last}\Z", pattern) is not None
    words = re.sub(r"\\[A-Za-z]", " ", pattern[3:])  # \b, \., \Z: not letters of a name
    return re.search(rf"(?<!\w){last}(?=\s*(?:[)|$]|\Z))", words) is not None
