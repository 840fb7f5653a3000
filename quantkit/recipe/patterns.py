"""Which module a rule selects: patterns, and the presets that are names for rule lists. Pure."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from typing import Literal

import regex

from quantkit.errors import UsageError

MAX_PATTERN = 1000
MATCH_SECONDS = 2
"""That a regular expression may take for one name; those of recipes take microseconds."""

Action = Literal["quantize", "keep"]

PRESETS: Mapping[str, tuple[tuple[str, Action], ...]] = {
    "experts-only": ((r"re:.*\.experts\.\d+\.[^.]+", "quantize"), ("*", "keep")),
    "all-linear": (("*", "quantize"),),
    "attention-source": (("*.self_attn.*", "keep"), ("*", "quantize")),
}
"""Preset -> (pattern, action) in order; quantize is the recipe's default scheme, keep is as stored
in the source.
"""


def find_pattern_fault(pattern: str) -> str | None:
    """One sentence why `pattern` cannot be used, or None."""
    if not pattern.removeprefix("re:").strip():
        return "an empty pattern matches nothing; write a glob such as '*.mlp.*' or 're:' and a regular expression"
    if len(pattern) > MAX_PATTERN:
        return f"a pattern has at most {MAX_PATTERN} characters, this one {len(pattern)}"
    if not pattern.startswith("re:"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # "possible nested set": legal, and no concern of the user's
            re.compile(pattern[3:])
            regex.compile(pattern[3:])  # which `matches` goes by
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        return f"not a regular expression: {error}"
    return None


@cache  # looked up for each of 45,000 linears
def compile_expression(text: str) -> regex.Pattern[str]:
    """A regular expression, compiled."""
    return regex.compile(text)


def matches_module(pattern: str, module: str) -> bool:
    """Whether the whole name matches: `re:` as a regular expression, otherwise as a case-sensitive
    glob.

    UsageError for an expression that takes too long.
    """
    if pattern.startswith("re:"):
        try:
            return (
                compile_expression(pattern[3:]).fullmatch(module, timeout=MATCH_SECONDS) is not None
            )
        except TimeoutError:
            raise UsageError(
                f"rules: {pattern!r}: expected to know within {MATCH_SECONDS} seconds whether it "
                f"matches {module!r}, found "
                "no answer; write it without repeats of repeats"
            ) from None
    return fnmatchcase(module, pattern)


def names_module(pattern: str, module: str) -> bool:
    """Whether the pattern matches and spells out the module's last part, as '*.mlp.gate' does and
    '*.mlp.*' does not.

    In a regular expression the last part must stand as a whole word at an end of an alternative
    ('re:.*(gate|up)').
    """
    if not matches_module(pattern, module):
        return False
    last = re.escape(module.rpartition(".")[2])
    if not pattern.startswith("re:"):
        return re.search(rf"(?<!\w){last}\Z", pattern) is not None
    words = re.sub(r"\\[A-Za-z]", " ", pattern[3:])  # \b, \., \Z: not letters of a name
    return re.search(rf"(?<!\w){last}(?=\s*(?:[)|$]|\Z))", words) is not None
