"""YAML of files that anybody may have written: read only when it is as flat, and as long, as it looks.

An alias makes ten lines stand for a billion values, brackets can nest deeper than Python's stack, and a tag asks for
something that no JSON can hold. None of them is of use in a spec, a task or a model card.
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
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
)  # fmt: skip
"""What ruamel raises on hostile text besides its own errors: chr() out of range, int() of nothing, a missing token."""


class UnreadableYaml(Exception):
    """Why a text is not read, in a few words; `line` counts from 1, 0 where it is not known."""

    def __init__(self, words: str, line: int = 0) -> None:
        self.line = line
        super().__init__(words)


def check_yaml(text: str) -> None:
    """Raise Unreadable for YAML that is broken, too long or too deep, and for anchors, aliases and tags."""
    if len(text) > MAX_CHARACTERS:
        raise UnreadableYaml(f"more than {MAX_CHARACTERS:,} characters")
    depth = 0
    try:
        for event in YAML(typ="safe", pure=True).parse(text):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UnreadableYaml(
                    f"values nested more than {MAX_DEPTH} deep", event.start_mark.line + 1
                )
            _check_plain(event)
    except MarkedYAMLError as error:
        raise UnreadableYaml(
            _words(error.problem), error.problem_mark.line + 1 if error.problem_mark else 0
        ) from None
    except (YAMLError, *PARSER_ERRORS) as error:
        raise UnreadableYaml(_words(str(error) or type(error).__name__)) from None


def load(text: str) -> object:
    """The values of a text that `check` allows: None, bool, int, float, str, lists, and mappings with text as keys.

    Raises Unreadable. Dates are text; integers of more than 64 bits, infinity and NaN are refused.
    """
    return _plain(load_any(text))


def load_any(text: str) -> object:
    """The values of a text that `check` allows, of any type that YAML has. Raises Unreadable."""
    check_yaml(text)
    try:
        value: object = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        raise UnreadableYaml(
            _words(error.problem), error.problem_mark.line + 1 if error.problem_mark else 0
        ) from None
    except (YAMLError, *PARSER_ERRORS) as error:
        raise UnreadableYaml(_words(str(error) or type(error).__name__)) from None
    return value


def _check_plain(event: Event) -> None:
    line = event.start_mark.line + 1
    if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
        raise UnreadableYaml("an anchor or alias; write the value out", line)
    if isinstance(event, NodeEvent) and getattr(event, "tag", None) is not None:
        raise UnreadableYaml("a tag; write the value plainly", line)


def _plain(value: object) -> object:
    """The same values, or Unreadable for what JSON could not hold."""
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise UnreadableYaml(f"the key {str(odd[0])[:40]!r}, which is no text; quote it")
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.date):  # and datetime, its child
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


def _words(problem: str | None) -> str:
    return " ".join((problem or "it ends too early").split())[:200]
