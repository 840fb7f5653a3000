"""Messages for pydantic's errors: expected value, actual value, known keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic_core import ErrorDetails

from quantkit.io.suggestions import suggest_name
from quantkit.io.yaml_document import KeyPath, printable

EXPECTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "model_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "tuple_type": "a list",
    "string_too_short": "text that is not empty",
    "finite_number": "a finite number",
    "too_short": "one entry or more",
}
"""pydantic's error type -> expected value."""
PATTERNS: Mapping[str, str] = {
    "^[0-9a-f]{40}$": "the 40 hexadecimal digits of a commit (a branch or a tag can be moved)",
    "^[0-9a-f]{64}$": "64 hexadecimal digits",
    "^[a-z][a-z0-9_]{0,31}$": "a name of lower-case letters, digits and _",
    "^[a-z]{2,3}(-[A-Za-z0-9]{2,8}){0,3}$": "a language tag such as en, zh or pt-BR",
}


def describe_fault(path: KeyPath, details: ErrorDetails, known: Sequence[str]) -> str:
    """Return the message for an error of the value at `path`; `known`: the keys of its mapping."""
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key.{suggest_name(str(path[-1]), known)} Known: {', '.join(known)}."
    if kind == "missing":
        return "missing; this key has no default"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("greater_than_equal", "less_than_equal"):
        expected = (
            f"at least {context['ge']:g}" if "ge" in context else f"at most {context['le']:g}"
        )
    elif kind in ("greater_than", "less_than"):
        expected = (
            f"more than {context['gt']:g}" if "gt" in context else f"less than {context['lt']:g}"
        )
    elif kind == "literal_error":
        expected = str(context["expected"]).replace("'", "")
    elif kind == "string_pattern_mismatch" and context["pattern"] in PATTERNS:
        expected = PATTERNS[context["pattern"]]
    elif kind == "string_too_long":
        expected = f"text of at most {context['max_length']:,} characters"
    else:
        expected = EXPECTED.get(kind, details["msg"].lower())
    hint = (
        " (quote it to make it text)"
        if kind == "string_type" and isinstance(value, int | float)
        else ""
    )
    return f"expected {expected}, found {describe_value(value)}{hint}"


def describe_value(value: object) -> str:
    """Return a short description of a value for a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return f"{'a' if value else 'an empty'} {'mapping' if isinstance(value, dict) else 'list'}"
    return printable(str(value)) if isinstance(value, int | float) else f"'{printable(str(value))}'"
