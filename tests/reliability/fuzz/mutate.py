"""Mutations that keep an input close to a valid one: a value, key or line changes, the rest stays.

Random bytes fail at the first brace; assumptions about structure are only tested by inputs that
have it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence

Mutation = Callable[[bytes, random.Random], bytes]

HOSTILE: tuple[object, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    128,
    10**6,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    0.0,
    0.5,
    -1.5,
    1e308,
    5e-324,
    "",
    " ",
    "a",
    "\x00",
    "\x1b[2J\x1b]0;x\x07",
    "\n",
    "\u202e",
    "\ud800",
    "é",
    "../x",
    "/etc/passwd",
    "..",
    ".",
    "C:\\x",
    "a/../../b",
    "A" * 1000,
    "NaN",
    "1e999",
    "none",
    "null",
    "true",
    "0",
    "%s%n",
    "{{7*7}}",
    [],
    {},
    [[]],
    [{}],
    {"": ""},
    [0],
    [-1, 2**63],
    [1, 2, 3],
    ["a"],
    {"a": 1},
)
"""Values that parsers often fail to handle."""

RAW: tuple[bytes, ...] = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-0",
    b"9" * 5000,
    b"0x10",
    b"[" * 3000,
    b'{"a":' * 2000,
    b"'a'",
    b'"\\ud800"',
    b'"\\u0000"',
    b"\xff",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\r",
    b"\x00",
    b"\x85",
    b"// x",
    b",",
    b"}",
    b"]",
    b'"',
    b"\x1b[31m",
)
"""Text that is not JSON, or that readers interpret differently."""

TEMPLATE_TOKENS: tuple[bytes, ...] = (
    b"{{", b"}}", b"{%", b"%}", b"{#", b"#}", b"-", b"|", b".", b"[", b"]", b"(", b")", b"~", b"*",
    b"**", b"%", b"not", b"is", b"in", b"if", b"else", b"endif", b"for", b"endfor", b"recursive",
    b"set", b"macro", b"endmacro", b"call", b"caller()", b"filter", b"include", b"import", b"raw",
    b"block", b"extends", b"self", b"loop", b"cycler", b"joiner", b"namespace", b"lipsum", b"range",
    b"range(99999)", b"dict", b"__class__", b"__init__", b"__globals__", b"mro", b"attr('x')",
    b"center(9999999)", b"indent", b"wordwrap", b"batch(3)", b"groupby", b"map('upper')", b"sum",
    b"select", b"tojson", b"xmlattr", b"urlize", b"format", b"regex_replace('(a+)+$', '')", b"none",
    b"question", b"choices", b"d", b"10", b"9999999999", b"'a'", b"'\\ud800'", b"\xff", b"\x00",
)  # fmt: skip
"""Words and marks of Jinja's language, and names that reach its objects."""

YAML_RAW: tuple[bytes, ...] = (
    b"&a [*a]",
    b"*a",
    b"!!python/object:os.system x",
    b"!!binary aGk=",
    b"!<tag:yaml.org,2002:str> x",
    b"<<: *a",
    b"? [a]",
    b"%YAML 1.1\n---",
    b"---",
    b"...",
    b"|",
    b">-",
    b"\t",
    b"- - - -",
    b"{a: b",
    b"[a, b",
    b"2001-01-01",
    b"0o17",
    b"0b1",
    b"1_000",
    b"12:30:45",
    b".inf",
    b".nan",
    b"~",
    b"yes",
    b'"\\U00110000"',
    b'"\\ud800"',
    b"'",
    b"a: b: c",
    b"#",
)

YAML_TEXT = tuple(text[:200] for text in RAW)
"""RAW for YAML, whose reader stops at 16 levels; ruamel needs 0.3 s for a line of 1,000."""


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change one to three values, keys or bytes of a JSON text."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice((
            _replace_value,
            _replace_value,
            _replace_value,
            _change_key,
            _insert_raw,
            _cut_bytes,
        ))(data, rng)
    return data


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Change, drop or repeat a line of a file with one JSON text per line."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, rng.choice(lines))
    elif kind == 2:
        lines[at] = rng.choice((b"", b"\r", b" ", b"null", b"[]"))
    else:
        lines[at] = mutate_json(lines[at], rng)
    return b"\n".join(lines)


def mutate_yaml(data: bytes, rng: random.Random) -> bytes:
    """Change one to three lines, values or bytes of a YAML text."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice((
            _change_line,
            _replace_yaml_value,
            _replace_yaml_value,
            _insert_raw_yaml,
            _cut_bytes,
        ))(data, rng)
    return data


def mutate_template(data: bytes, rng: random.Random) -> bytes:
    """Insert, drop or exchange a token of a Jinja template, or change a byte."""
    tokens = re.split(rb"(\W)", data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(tokens))
        kind = rng.randrange(4)
        if kind == 0:
            tokens[at] = rng.choice(TEMPLATE_TOKENS)
        elif kind == 1:
            tokens.insert(at, rng.choice(TEMPLATE_TOKENS))
        elif kind == 2:
            tokens[at] = rng.choice(tokens)
        else:
            tokens[at] = b""
    data = b"".join(tokens)
    return mutate_bytes(data, rng) if rng.random() < 0.2 else data


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change one to three places of a binary input."""
    for _ in range(rng.randint(1, 3)):
        data = rng.choice((_flip_byte, _cut_bytes, _insert_raw))(data, rng)
    return data


def _replace_value(data: bytes, rng: random.Random) -> bytes:
    """Replace, drop or repeat a value anywhere in the tree."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _insert_raw(data, rng)
    places = _list_places(tree)
    if not places:
        return json.dumps(rng.choice(HOSTILE)).encode()
    parent, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0 and isinstance(parent, dict | list):
        del parent[key]  # type: ignore[arg-type]
    elif kind == 1:
        other, name = rng.choice(places)
        parent[key] = other[name]  # type: ignore[index,call-overload]
    elif kind == 2:
        parent[key] = [parent[key]] * rng.randint(1, 3)  # type: ignore[index,call-overload]
    else:
        parent[key] = rng.choice(HOSTILE)  # type: ignore[index,call-overload]
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):  # a value contains itself
        return data


def _list_places(tree: object, limit: int = 3000) -> list[tuple[object, object]]:
    """List (parent, key) of up to about `limit` values in a JSON tree."""
    places: list[tuple[object, object]] = []
    pending = [tree]
    while pending and len(places) < limit:
        node = pending.pop()
        items = (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, list)
            else ()
        )
        for key, value in items:
            places.append((node, key))
            pending.append(value)
    return places


def _change_key(data: bytes, rng: random.Random) -> bytes:
    """Rename or duplicate a key."""
    marks = [at for at in range(len(data)) if data.startswith(b'":', at)]
    if not marks:
        return _insert_raw(data, rng)
    end = rng.choice(marks)
    begin = data.rfind(b'"', 0, end) + 1
    name = data[begin:end]
    if rng.random() < 0.5:
        return data[: begin - 1] + b'"' + name + b'": 1, "' + data[begin:]
    changed = json.dumps(str(rng.choice([value for value in HOSTILE if isinstance(value, str)])))[
        1:-1
    ].encode()
    return data[:begin] + changed + data[end:]


def _insert_raw(data: bytes, rng: random.Random) -> bytes:
    return _insert_bytes(data, rng, rng.choice(RAW))


def _insert_raw_yaml(data: bytes, rng: random.Random) -> bytes:
    return _insert_bytes(data, rng, rng.choice((*YAML_TEXT, *YAML_RAW)))


def _insert_bytes(data: bytes, rng: random.Random, insert: bytes) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + insert + data[at + rng.choice((0, 0, 1, len(insert))) :]


def _cut_bytes(data: bytes, rng: random.Random) -> bytes:
    first, last = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    return data[:first] + data[last:] if rng.random() < 0.7 else data[:last]


def _flip_byte(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _change_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(rng.randint(0, len(lines)), lines[at])
    elif kind == 2:
        lines[at] = b" " * rng.randint(1, 4) + lines[at]
    else:
        lines[at] = lines[at].lstrip()
    return b"\n".join(lines)


def _replace_yaml_value(data: bytes, rng: random.Random) -> bytes:
    """Replace the value after a colon."""
    lines: Sequence[bytes] = data.split(b"\n")
    candidates = [at for at, line in enumerate(lines) if b":" in line]
    if not candidates:
        return _insert_raw_yaml(data, rng)
    at = rng.choice(candidates)
    values = [json.dumps(value).encode() for value in HOSTILE] + [*YAML_RAW, *YAML_TEXT]
    changed = lines[at].split(b":", 1)[0] + b": " + rng.choice(values)
    return b"\n".join([*lines[:at], changed, *lines[at + 1 :]])
