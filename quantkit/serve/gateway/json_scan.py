"""A strict check of a JSON object that keeps offsets instead of values, in steps of a millisecond.

`json.loads` takes up to ten times the size of a body, stops the event loop for as long as it takes,
accepts NaN and lets the last of two equal keys win. Here every token is matched in place, in
matches of bounded length; the offsets of a few top-level members are the only result. Accepted is
what RFC 8259 calls JSON, in UTF-8 without a byte order mark, with unique keys and finite numbers.

A scan is a generator, and the event loop serves others between its steps. A thread would not do:
every call into the system hands it the interpreter's lock for five milliseconds, and a gateway
makes one per token of a stream.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from math import isfinite

MAX_DEPTH = 200
"""Nested containers; engines' own parsers stop at about as many."""
MAX_TOKENS = 200_000
"""Keys and values; a chat of 50,000 messages has as many. Numbers and short texts in lists are
matched many at a time and do not count. Together they take half a second and 20 MB."""
MAX_NUMBER_BYTES = 400
"""A float64 has at most 309 digits before its point."""
MAX_KEY_BYTES = 1 << 16
STEP_TOKENS, STEP_BYTES = 300, 1 << 16
"""Work between two steps: each takes about a millisecond."""

_WS = rb"[ \t\n\r]"
_SPACE = re.compile(_WS + rb"{0,65536}+")  # more is no layout
_TEXT = re.compile(rb'(?:[^"\\\x00-\x1f]{1,1024}+|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4}){1,64}+')
_DIGITS = rb"[0-9]{1,400}+"
_NUMBER = (
    rb"-?(?:0|[1-9](?:"
    + _DIGITS
    + rb")?+)(?:\."
    + _DIGITS
    + rb")?+(?:[eE][+-]?+"
    + _DIGITS
    + rb")?+"
)
_SCALAR = re.compile(rb"true|false|null|" + _NUMBER)
_KEY = re.compile(
    rb'"([^"\\\x00-\x1f]{0,256}+)"' + _WS + rb"{0,99}+:" + _WS + rb"{0,99}+(?!" + _WS + rb")"
)  # as nearly all keys are
_ITEMS = re.compile(
    rb'(?:(?:"[^"\\\x00-\x1f]{0,256}+"|-?(?:0|[1-9][0-9]{0,17}+)(?:\.[0-9]{1,17}+)?+)'
    + _WS + rb"{0,99}+," + _WS + rb"{0,99}+(?!" + _WS + rb")){1,250}+"
)  # fmt: skip
_ITEM_DEPTH = 2  # containers around an item of a top-level member
_QUOTE, _COMMA, _COLON = b'",:'
_OPEN_LIST, _CLOSE_LIST, _CLOSE_OBJECT = b"[]}"


class InvalidJson(ValueError):
    """The text is no JSON object as described above; the message has no prefix."""


@dataclass(frozen=True, slots=True)
class Member:
    """A top-level member, by offsets.

    start: its comma, or the byte after the object's brace. value, end: its value. n_texts: the
    items of its value that are no scalars but texts, lists or objects, if it is a list.
    """

    start: int
    value: int
    end: int
    n_texts: int


@dataclass(frozen=True, slots=True)
class ScannedObject:
    """A valid object. start: the offset after its first brace; end: that of its last brace."""

    members: dict[bytes, Member]
    start: int
    end: int


def scan_object(text: bytes, names: frozenset[bytes]) -> ScannedObject:
    """Check a JSON object and return its members of these names; InvalidJson for anything else."""
    scan = scan_in_steps(text, names)
    while True:
        try:
            next(scan)
        except StopIteration as end:
            scanned: ScannedObject = end.value
            return scanned


async def scan_between_others(text: bytes, names: frozenset[bytes]) -> ScannedObject:
    """As `scan_object`, while the event loop serves others."""
    scan = scan_in_steps(text, names)
    while True:
        try:
            next(scan)
        except StopIteration as end:
            scanned: ScannedObject = end.value
            return scanned
        await asyncio.sleep(0)


def scan_in_steps(text: bytes, names: frozenset[bytes]) -> Generator[None, None, ScannedObject]:
    """Check a JSON object; yields after each step and returns the result of `scan_object`."""
    yield from check_utf8(text)
    try:
        return (yield from Scanner(text, names).scan())
    except IndexError:  # read beyond the end
        raise InvalidJson(
            f"expected JSON, found its end within a value, at byte {len(text)}"
        ) from None


def check_utf8(text: bytes) -> Iterator[None]:
    """Raise InvalidJson unless a text is UTF-8, decoded in pieces to keep nothing."""
    decoder, view = codecs.getincrementaldecoder("utf-8")(), memoryview(text)
    for start in range(0, len(view), STEP_BYTES):
        try:
            decoder.decode(view[start : start + STEP_BYTES], start + STEP_BYTES >= len(view))
        except UnicodeDecodeError as fault:
            raise InvalidJson(
                f"expected UTF-8, found an error ({fault.reason}) near byte {start + fault.start}"
            ) from None
        if start:
            yield


def skip_space(text: bytes, at: int) -> int:
    """Return the offset of the next byte that is no space."""
    match = _SPACE.match(text, at)
    assert match
    return match.end()


def quote_bytes(text: bytes, limit: int = 10) -> str:
    """Return the start of a text for a message, printable and in quotes."""
    return repr(text[:limit].decode("utf-8", "replace"))


class Scanner:
    """One pass over a text. Mutable; IndexError at its end."""

    def __init__(self, text: bytes, names: frozenset[bytes]) -> None:
        self.text, self.names = text, names
        self.members: dict[bytes, Member] = {}
        self.stack: list[set[bytes] | None] = []  # keys of the open objects; None: an open list
        self.n_tokens = self.n_texts = 0
        self.step_tokens, self.step_bytes = STEP_TOKENS, STEP_BYTES  # where the step ends
        self.key, self.comma, self.value = b"", 0, 0  # of the open top-level member

    def scan(self) -> Generator[None, None, ScannedObject]:
        """Check the whole text; yields after each step."""
        text, stack = self.text, self.stack
        at = start = skip_space(text, 0)
        if text[start : start + 1] != b"{":
            raise InvalidJson(
                f"expected a JSON object, found {quote_bytes(text[start : start + 10])}"
            )
        while True:  # a value starts
            if self.ends_step(at):
                yield
            first = text[at]
            if (end := self.skip_items(at)) > at:
                at = end
                continue
            self.count_token(at)
            self.n_texts += len(stack) == _ITEM_DEPTH and first in b'"[{'
            if first in b"[{":
                at, is_open = self.open_container(at)
                if is_open:
                    continue
            elif first == _QUOTE:
                at = yield from self.skip_text(at + 1)
            else:
                at = self.skip_scalar(at)
            at = self.end_value(at)
            if not stack:
                break
        if skip_space(text, at) != len(text):
            raise self.make_fault(at, "the end")
        return ScannedObject(self.members, start + 1, at - 1)

    def ends_step(self, at: int) -> bool:
        """Return whether enough was done since the last step, and begin the next one."""
        is_end = self.n_tokens > self.step_tokens or at > self.step_bytes
        if is_end:
            self.step_tokens, self.step_bytes = self.n_tokens + STEP_TOKENS, at + STEP_BYTES
        return is_end

    def open_container(self, at: int) -> tuple[int, bool]:
        """Open a list or an object.

        Returns the offset of its first value and True, or its end and False if it is empty.
        """
        is_list = self.text[at] == _OPEN_LIST
        if len(self.stack) >= MAX_DEPTH:
            raise self.make_fault(at, f"at most {MAX_DEPTH} nested lists and objects")
        self.stack.append(None if is_list else set())
        inside = at + 1
        at = skip_space(self.text, inside)
        if self.text[at] == (_CLOSE_LIST if is_list else _CLOSE_OBJECT):
            self.stack.pop()
            return at + 1, False
        return (at if is_list else self.read_key(at, inside)), True

    def read_key(self, at: int, comma: int) -> int:
        """Read a key of the innermost object; return the offset of its value."""
        self.count_token(at)
        match = _KEY.match(self.text, at)
        key, value = (match[1], match.end()) if match else self.read_odd_key(at)
        keys = self.stack[-1]
        assert keys is not None
        if key in keys:
            raise InvalidJson(
                f"expected every key once, found {quote_bytes(key, 50)} twice in one object"
            )
        keys.add(key)
        if len(self.stack) == 1:
            self.key, self.comma, self.value, self.n_texts = key, comma, value, 0
        return value

    def read_odd_key(self, at: int) -> tuple[bytes, int]:
        """Read a key that is long or has escapes.

        Returns it without escapes, and the offset of its value.
        """
        if self.text[at] != _QUOTE:
            raise self.make_fault(at, "a key")
        end = at + 1
        while match := _TEXT.match(self.text, end):
            end = match.end()
            if end - at > MAX_KEY_BYTES:
                raise self.make_fault(at, f"a key of at most {MAX_KEY_BYTES} bytes")
        end = self.end_text(end)
        key = json.loads(self.text[at:end]).encode("utf-8", "surrogatepass")
        colon = skip_space(self.text, end)
        if self.text[colon] != _COLON:
            raise self.make_fault(colon, "a colon")
        return key, skip_space(self.text, colon + 1)

    def count_token(self, at: int) -> None:
        """Count a key or a value; InvalidJson if there are too many."""
        self.n_tokens += 1
        if self.n_tokens > MAX_TOKENS:
            raise self.make_fault(at, f"at most {MAX_TOKENS} keys and values")

    def end_value(self, at: int) -> int:
        """Close the containers that end after a value.

        Returns the offset of the next value, or the end of the object itself.
        """
        while self.stack:
            keys = self.stack[-1]
            if len(self.stack) == 1 and self.key in self.names:
                self.members[self.key] = Member(self.comma, self.value, at, self.n_texts)
            at = skip_space(self.text, at)
            closing = self.text[at]
            if closing == _COMMA:
                following = skip_space(self.text, at + 1)
                return following if keys is None else self.read_key(following, at)
            if closing != (_CLOSE_LIST if keys is None else _CLOSE_OBJECT):
                raise self.make_fault(at, "a comma or the end of a list or object")
            self.stack.pop()
            at += 1
        return at

    def skip_items(self, at: int) -> int:
        """Return the end of numbers and short texts in a list, with the comma after each."""
        stack = self.stack
        items = _ITEMS.match(self.text, at) if stack and stack[-1] is None else None
        if not items:
            return at
        if len(stack) == _ITEM_DEPTH:
            self.n_texts += items[0].count(b'"') // 2
        return items.end()

    def skip_text(self, at: int) -> Generator[None, None, int]:
        """Return the end of a text that begins before an offset; yields after each step."""
        while match := _TEXT.match(self.text, at):
            at = match.end()
            if self.ends_step(at):
                yield
        return self.end_text(at)

    def end_text(self, at: int) -> int:
        """Return the end of a text whose characters end at an offset."""
        if self.text[at] != _QUOTE:
            raise self.make_fault(at, "a character or an escape of JSON")
        return at + 1

    def skip_scalar(self, at: int) -> int:
        """Return the end of a number, true, false or null."""
        match = _SCALAR.match(self.text, at)
        if not match:
            raise self.make_fault(at, "a value")
        number = match[0]
        if len(number) > MAX_NUMBER_BYTES or (
            number[-1:].isdigit() and not isfinite(float(number))
        ):
            raise self.make_fault(at, "a finite number")
        return match.end()

    def make_fault(self, at: int, expected: str) -> InvalidJson:
        """Return the error for a text that differs at an offset."""
        actual = quote_bytes(self.text[at : at + 10])
        return InvalidJson(f"expected JSON, {expected} at byte {at}, found {actual}")
