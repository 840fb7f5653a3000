"""YAML from untrusted files: read only without anchors, aliases and tags, and within limits.

An alias makes ten lines stand for a billion values, brackets can nest deeper than Python's stack,
and a tag asks for values that JSON cannot hold. A spec, a task or a model card needs none of them.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    Event,
    NodeEvent,
)

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 24

PARSER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""ruamel's errors on hostile text besides its own: chr() out of range, int() of an empty string."""


class UnreadableYaml(Exception):
    """The reason in a few words why a text is refused; `line` counts from 1, 0 if unknown."""

    def __init__(self, words: str, line: int = 0) -> None:
        self.line = line
        super().__init__(words)


def check_yaml(text: str) -> None:
    """Check a YAML text.

    Raises UnreadableYaml if it is broken, too long, too deep, or has an anchor, an alias or a tag.
    """
    if len(text) > MAX_CHARACTERS:
        raise UnreadableYaml(f"more than {MAX_CHARACTERS:,} characters")
    depth = 0
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > MAX_DEPTH:
                line = event.start_mark.line + 1
                raise UnreadableYaml(f"values nested more than {MAX_DEPTH} deep", line)
            _check_event(event)
    except (YAMLError, *PARSER_ERRORS) as error:
        raise _make_error(error) from None


def load(text: str) -> object:
    """Return the values of a YAML text that `check_yaml` accepts, as JSON values.

    Dates become text. Raises UnreadableYaml, also for integers of more than 64 bits, infinity and
    NaN.
    """
    return _convert_to_json(load_any(text))


def load_any(text: str) -> object:
    """Return the values of a YAML text that `check_yaml` accepts, of any type.

    Raises UnreadableYaml.
    """
    check_yaml(text)
    try:
        value: object = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, *PARSER_ERRORS) as error:
        raise _make_error(error) from None
    return value


def _make_error(error: Exception) -> UnreadableYaml:
    """Return the error for a text that ruamel refuses."""
    if isinstance(error, MarkedYAMLError):
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        return UnreadableYaml(_shorten(error.problem), line)
    return UnreadableYaml(_shorten(str(error) or type(error).__name__))


def _check_event(event: Event) -> None:
    """Check that an event has no anchor, alias or tag."""
    line = event.start_mark.line + 1
    if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
        raise UnreadableYaml("an anchor or alias; write the value out", line)
    if isinstance(event, NodeEvent) and getattr(event, "tag", None) is not None:
        raise UnreadableYaml("a tag; write the value plainly", line)


def _convert_to_json(value: object) -> object:
    """Return the value with dates as text; raises UnreadableYaml if JSON cannot hold it."""
    if isinstance(value, Mapping):
        bad_keys = [key for key in value if not isinstance(key, str)]
        if bad_keys:
            raise UnreadableYaml(f"the key {str(bad_keys[0])[:40]!r}, which is no text; quote it")
        return {key: _convert_to_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_convert_to_json(item) for item in value]
    if isinstance(value, datetime.date):  # and its subclass datetime
        return value.isoformat()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value):
        return value
    raise UnreadableYaml(f"a value that cannot be used ({type(value).__name__})")


def _shorten(problem: str | None) -> str:
    return " ".join((problem or "it ends too early").split())[:200]
