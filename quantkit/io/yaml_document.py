"""YAML for recipes and other user files: one mapping of plain values, with line numbers.

YAML 1.2 core schema, read through ruamel.yaml's event stream. These features are errors: anchors,
aliases, tags, directives, duplicate keys, several documents, NUL and lone surrogates, and input
that is too large or too deep for a recipe. Pure: text in, values out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamStartEvent,
)

from quantkit.errors import RecipeError

KeyPath = tuple[str | int, ...]

MAX_CHARACTERS = 200_000
MAX_DEPTH = 16
MAX_DIGITS = 18
INVALID_TEXT = "text must not contain NUL or half a surrogate pair"

_WORDS: Mapping[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_INTEGER = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0x[0-9a-fA-F]{1,15}|0o[0-7]{1,15}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

# Errors of ruamel's scanner on hostile text besides its own: chr() out of range, int(""), a missing
# token. The user sees the same message for all of them.
PARSER_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class YamlDocument:
    """Plain values (dict, list, str, int, float, bool, None) and the line of every key path.

    Line 0 stands for an override.
    """

    name: str
    values: Mapping[str, object]
    lines: Mapping[KeyPath, int]

    def where(self, path: KeyPath) -> str:
        """Where the nearest enclosing key was written: "recipe.yaml:14", or "override
        output.path".
        """
        for end in range(len(path), 0, -1):
            line = self.lines.get(path[:end])
            if line is not None:
                return f"{self.name}:{line}" if line else f"override {format_path(path[:end])}"
        return f"{self.name}:1"

    def line(self, path: KeyPath) -> int:
        """The line of the nearest enclosing key; 0 when that is an override."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return 1

    def with_value(self, path: KeyPath, value: object) -> YamlDocument:
        """A copy in which `path` (keys only) has another value; sections on the way are made where
        absent.
        """
        values: dict[str, object] = dict(self.values)
        inner = values
        for depth, key in enumerate(path[:-1], 1):
            section = inner.get(str(key))
            if section is not None and not isinstance(section, dict):
                actual = "a list" if isinstance(section, list) else printable(str(section))
                raise RecipeError([
                    f"override {format_path(path)}: expected keys in {format_path(path[:depth])}, "
                    f"found {actual}; override {format_path(path[:depth])} itself"
                ])
            copied: dict[str, object] = dict(section or {})
            inner[str(key)] = copied
            inner = copied
        inner[str(path[-1])] = value
        return replace(self, values=values, lines={**self.lines, path: 0})


def parse_document(
    text: str, name: str, kind: str = "recipe", first_key: str = "version: 1"
) -> YamlDocument:
    """The mapping that `text` holds; RecipeError with every fault otherwise.

    Messages call the file `name`, and its kind of document `kind`. Raises RecipeError with every
    fault. The caller may change the values.
    """
    document = _parse_document(text, name, kind, first_key)
    return replace(document, values=copy.deepcopy(document.values))


@lru_cache(maxsize=32)  # a build reads its sets and tasks up to six times, .01 s each
def _parse_document(text: str, name: str, kind: str, first_key: str) -> YamlDocument:
    reader = _Reader(name=name, kind=kind, first_key=first_key, lines={}, faults=[])
    try:
        if len(text) > MAX_CHARACTERS:
            raise RecipeError([
                f"{name}: a {kind} has at most {MAX_CHARACTERS:,} characters, this one "
                f"{len(text):,}"
            ])
        values = reader.document(_events(text, name))
    except RecipeError as error:
        raise RecipeError([*reader.faults, *error.faults]) from None
    if reader.faults:
        raise RecipeError(reader.faults)
    return YamlDocument(name=name, values=values, lines=reader.lines)


def parse_value(text: str, name: str) -> object:
    """The value of one override: `[..]` and `{..}` as YAML, anything else as one plain scalar."""
    if text.lstrip()[:1] in ("[", "{"):
        return parse_document(f"value: {text}", name).values["value"]
    return parse_scalar(text.strip())


def parse_scalar(text: str) -> str | int | float | bool | None:
    """A plain scalar by the YAML 1.2 core schema; an integer of more than 18 digits stays text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= MAX_DIGITS else text
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def is_invalid_text(text: str) -> bool:
    """Whether no file in UTF-8 can hold this, or none should."""
    return "\0" in text or any("\ud800" <= character <= "\udfff" for character in text)


def format_path(path: KeyPath) -> str:
    """("rules", 0, "match") -> "rules[0].match"."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return printable(text.removeprefix("."))


def printable(text: str, limit: int = 80) -> str:
    """Text that came from a user, safe inside a one-line message."""
    clean = text if text.isprintable() else repr(text)[1:-1]
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def _events(text: str, name: str) -> Iterator[Event]:
    """Yield ruamel's events, with its errors as RecipeError. Lazy: a reader can stop at a depth."""
    events: Iterator[Event] | None = None
    while True:
        try:
            if events is None:
                events = iter(YAML(typ="safe", pure=True).parse(text))
            event = next(events)
        except StopIteration:
            return
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            problem = printable(error.problem or "it ends too early", 200)
            raise RecipeError([f"{name}:{line}: not valid YAML: {problem}"]) from None
        except YAMLError as error:
            raise RecipeError([
                f"{name}: not valid YAML: {printable(_first_line(error), 200)}"
            ]) from None
        except PARSER_FAULTS as error:
            raise RecipeError([
                f"{name}: not valid YAML: {printable(_first_line(error), 200)}"
            ]) from None
        yield event


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Builds plain values from events, and collects `lines` and `faults`."""

    name: str
    kind: str
    first_key: str
    lines: dict[KeyPath, int]
    faults: list[str]

    def document(self, events: Iterator[Event]) -> dict[str, object]:
        """Return the mapping of the stream; RecipeError for empty text."""
        values: dict[str, object] | None = None
        for event in events:
            if isinstance(event, DocumentStartEvent):
                if event.version or event.tags:
                    self.add_fault(
                        event, f"%YAML and %TAG directives are not allowed in a {self.kind}"
                    )
                if values is not None:
                    raise RecipeError([
                        f"{self.at(event)}: a {self.kind} is one YAML document, a second one "
                        "starts here"
                    ])
            elif isinstance(event, MappingStartEvent):
                values = self.mapping(event, events, ())
            elif isinstance(event, NodeEvent):
                node = (
                    "a list" if isinstance(event, SequenceStartEvent) else self.describe_node(event)
                )
                raise RecipeError([
                    f"{self.at(event)}: expected a mapping of keys ({self.first_key}, ...), "
                    f"found {node}"
                ])
            elif not isinstance(event, StreamStartEvent) and values is None:
                raise RecipeError([
                    f"{self.name}: the {self.kind} is empty; it starts with '{self.first_key}'"
                ])
        return values or {}

    def value(self, event: Event, events: Iterator[Event], path: KeyPath) -> object:
        """Any node, at most MAX_DEPTH deep."""
        if len(path) > MAX_DEPTH:
            raise RecipeError([
                f"{self.at(event)}: nested more than {MAX_DEPTH} deep, no {self.kind} is"
            ])
        if isinstance(event, AliasEvent):
            self.add_fault(
                event, f"aliases (*name) are not allowed in a {self.kind}; write the value out"
            )
            return None
        if isinstance(event, MappingStartEvent):
            return self.mapping(event, events, path)
        if isinstance(event, SequenceStartEvent):
            return self.sequence(event, events, path)
        return self.scalar(event) if isinstance(event, ScalarEvent) else None

    def mapping(
        self, start: MappingStartEvent, events: Iterator[Event], path: KeyPath
    ) -> dict[str, object]:
        """Return the keys and values up to the end of the mapping."""
        self.plain(start)
        values: dict[str, object] = {}
        for event in events:
            if isinstance(event, MappingEndEvent):
                break
            if not isinstance(event, ScalarEvent):
                raise RecipeError([f"{self.at(event)}: a key must be plain text"])
            self.scalar(event)  # adds its faults; a key is always text
            key = str(event.value)
            key_path = (*path, key)
            if key in values:
                self.add_fault(
                    event,
                    f"{format_path(key_path)}: written twice, first in line {self.lines[key_path]}",
                )
            self.lines.setdefault(key_path, event.start_mark.line + 1)
            values[key] = self.value(next(events), events, key_path)
        return values

    def sequence(
        self, start: SequenceStartEvent, events: Iterator[Event], path: KeyPath
    ) -> list[object]:
        """Return the items up to the end of the list."""
        self.plain(start)
        items: list[object] = []
        for event in events:
            if isinstance(event, SequenceEndEvent):
                break
            item_path = (*path, len(items))
            self.lines[item_path] = event.start_mark.line + 1
            items.append(self.value(event, events, item_path))
        return items

    def scalar(self, event: ScalarEvent) -> object:
        """Return the value of a plain scalar; a quoted one is text."""
        self.plain(event)
        text = str(event.value)
        if is_invalid_text(text):
            self.add_fault(event, INVALID_TEXT)
        return parse_scalar(text) if event.implicit[0] else text

    def plain(self, event: NodeEvent) -> None:
        """Add a fault for an anchor or a tag."""
        if event.anchor:
            self.add_fault(
                event,
                f"anchors (&{printable(str(event.anchor))}) are not allowed in a {self.kind}; "
                "write the value out",
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            self.add_fault(
                event,
                f"tags ({printable(str(tag))}) are not allowed in a {self.kind}; quote the value "
                "to make it text",
            )

    def describe_node(self, event: Event) -> str:
        """How a message calls a node that is no mapping."""
        return f"'{printable(event.value)}'" if isinstance(event, ScalarEvent) else "an alias"

    def add_fault(self, event: Event, sentence: str) -> None:
        """Add a fault at the line of an event."""
        self.faults.append(f"{self.at(event)}: {sentence}")

    def at(self, event: Event) -> str:
        """Return file and line of an event."""
        return f"{self.name}:{event.start_mark.line + 1}"
