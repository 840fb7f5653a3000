"""The strict scan of a body accepts what Python's parser accepts, without NaN and equal keys."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.io.files import parse_finite, reject_duplicate_keys
from quantkit.serve.gateway import json_scan
from quantkit.serve.gateway.json_scan import STEP_BYTES, InvalidJson, scan_object

NAMES = frozenset([b"prompt", b"stream", b"n"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=5) | st.dictionaries(st.text(max_size=4), children, max_size=4)
    ),
    max_leaves=20,
)
OBJECT = st.dictionaries(st.sampled_from(["prompt", "stream", "n", "x", "\x7f", "é"]), JSON)


def parse_strictly(text: bytes) -> dict[str, Any] | None:
    """Parse with Python's parser; None for text that the scan must reject."""

    def parse_integer(digits: str) -> int:
        parse_finite(digits)
        return int(digits)

    try:
        value = json.loads(
            text.decode(),
            object_pairs_hook=reject_duplicate_keys,
            parse_float=parse_finite,
            parse_constant=parse_finite,
            parse_int=parse_integer,
        )
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def check_scan(text: bytes) -> None:
    """Compare the scan with Python's parser."""
    expected = parse_strictly(text)
    try:
        scanned = scan_object(text, NAMES)
    except InvalidJson as fault:
        assert expected is None and str(fault)
        return
    assert expected is not None
    assert scanned.members.keys() == NAMES & {name.encode() for name in expected if name.isascii()}
    for name, member in scanned.members.items():
        value = expected[name.decode()]
        assert json.loads(text[member.value : member.end]) == value
        if isinstance(value, list):
            assert member.n_texts == sum(isinstance(one, str | list | dict) for one in value)
        assert text[member.start : member.start + 1] == b"," or member.start == scanned.start
    assert text[scanned.end : scanned.end + 1] == b"}"
    assert text[scanned.start - 1 : scanned.start] == b"{"


@settings(max_examples=300, deadline=None)
@given(OBJECT, st.booleans(), st.sampled_from([None, 1]))
def test_scan_accepts_what_a_strict_parser_accepts(
    values: Any, ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    check_scan(text.encode("utf-8", "replace"))


@settings(max_examples=500, deadline=None)
@given(OBJECT, st.integers(0, 2**32))
def test_scan_rejects_what_a_strict_parser_rejects(values: Any, seed: int) -> None:
    """Damaged objects: bytes changed, removed, repeated and inserted."""
    rng = random.Random(seed)
    text = bytearray(json.dumps(values).encode("utf-8", "replace"))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        pieces = [b"", b",", b'"', b"{", b"}", b"]", b"[1,2,", b"\\", b"NaN", b"1e999", b"\xff",
                  b'"n":1,', b"\x00", b"-", b"01", bytes(text[at : at + 5])]  # fmt: skip
        text[at : at + rng.randint(0, 2)] = rng.choice(pieces)
    check_scan(bytes(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "expected a JSON object"),
        (b"[]", "expected a JSON object"),
        (b"\xef\xbb\xbf{}", "expected a JSON object"),
        ('{"a": 1}'.encode("utf-16"), "expected UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "expected UTF-8"),
        (b'{"a": NaN}', "expected JSON, a value at byte"),
        (b'{"a": -Infinity}', "expected JSON, a value at byte"),
        (b'{"a": [1, 2, Infinity]}', "expected JSON, a value at byte"),
        (b'{"a": 1e999}', "a finite number at byte"),
        (b'{"a": ' + b"9" * 401 + b"}", "a finite number at byte"),
        (b'{"a": 1, "a": 1}', "expected every key once, found 'a' twice"),
        (b'{"a": 1, "\\u0061": 1}', "expected every key once, found 'a' twice"),
        (b'{"x": [{"a": 1, "b": {}, "a": 1}]}', "expected every key once, found 'a' twice"),
        (b'{"a": "\n"}', "a character or an escape of JSON at byte"),
        (b'{"a": "\\x"}', "a character or an escape of JSON at byte"),
        (b'{"a": 1} {}', "the end at byte"),
        (b'{"a": 1', "found its end within a value, at byte 7"),
        (b'{"a": [1,', "found its end within a value, at byte 9"),
        (b'{"a" 1}', "a colon at byte"),
        (b"{1: 1}", "a key at byte"),
        (b'{"a": 1]', "a comma or the end"),
        (b'{"a": ' + b"[" * 100_000, "at most 200 nested"),
        (b'{"a": [' + b"{}," * 300_000 + b"1]}", "at most 200000 keys and values"),
    ],
)
def test_invalid_json_is_named_with_its_place(text: bytes, expected: str) -> None:
    with pytest.raises(InvalidJson) as caught:
        scan_object(text, NAMES)
    assert expected in str(caught.value)


def test_large_lists_of_numbers_and_texts_are_accepted() -> None:
    """A request of token ids has more values than MAX_TOKENS."""
    for item, n_texts in ((b"12345", 0), (b"1.5", 0), (b'"a b"', 1)):
        text = b'{"prompt": [' + b", ".join([item] * 500_000) + b"]}"
        member = scan_object(text, NAMES).members[b"prompt"]
        assert member.n_texts == n_texts * 500_000
        assert text[member.value : member.end].endswith(item + b"]")


def test_scan_keeps_no_copy_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is a match of a text, not the values; and no match is longer than a step."""
    import tracemalloc

    text = b'{"prompt": "' + "é日\\n".encode() * 700_000 + b'", "x": [' + b"1," * 900_000 + b"1]}"
    tracemalloc.start()
    try:
        scan_object(text, NAMES)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert max(map(len, json_scan._TEXT.findall(text))) <= STEP_BYTES
