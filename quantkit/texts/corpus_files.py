"""The documents of a set: JSON lines, a local text file, or a data set of the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from quantkit.errors import CalibrationError
from quantkit.io.files import (
    DuplicateKey,
    is_encodable,
    is_file,
    read_bytes,
    reject_duplicate_keys,
    shorten_repr,
)
from quantkit.texts.corpus_spec import (
    DATA_VARIABLE,
    HubSet,
    LocalText,
    Spec,
    first_line,
    raise_faults,
)

LIMIT_BYTES = 1_000_000_000
"""Of a set's file; what is calibrated on is thousands of times smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text and the domain that its scores are reported under."""

    domain: str
    text: str


def read_documents(spec: Spec) -> tuple[tuple[Document, ...], str]:
    """The rows of the set's JSON lines file, and the file's sha256, which must be the spec's."""
    path = cast(Path, spec.file)
    if not is_file(path):
        raise CalibrationError(
            f"{spec.where}: file: expected {path}, found no such file. Correct the key"
        )
    data = read_bytes(path, LIMIT_BYTES, CalibrationError)
    documents = parse_jsonl(data, str(path), spec.domains)
    absent = [
        domain
        for domain in spec.domains
        if all(document.domain != domain for document in documents)
    ]
    if absent:
        raise CalibrationError(
            f"{path}: expected documents of every domain in {spec.where}, found none of {', '.join(absent)}. "
            f"Correct `domains`"
        )
    return documents, _checked_sha256(data, spec.sha256, path, spec.where)


def _checked_sha256(data: bytes, expected: str, path: Path, where: Path) -> str:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise CalibrationError(
            f"{path}: expected sha256 {expected} ({where}), found {found}. "
            f"Restore the file, or state the new hash if you changed it on purpose"
        )
    return found


def parse_jsonl(data: bytes, where: str, domains: tuple[str, ...]) -> tuple[Document, ...]:
    """Documents of a JSON lines file: UTF-8 without byte order mark, LF line ends, no empty line.

    CalibrationError lists the faults as `where:line`.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise CalibrationError(
            f"{where}:1: expected UTF-8 without a byte order mark, found one. Save it without"
        )
    documents: list[Document] = []
    faults: list[str] = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], start=1):
        result = _parse_row(line, domains)
        if isinstance(result, Document):
            documents.append(result)
        else:
            faults.append(f"{where}:{number}: {result}")
    if not data:
        faults.append(f"{where}:1: expected at least one row, found an empty file")
    raise_faults(faults)
    return tuple(documents)


def _parse_row(line: bytes, domains: tuple[str, ...]) -> Document | str:
    """The document in a line, or what is wrong with it."""
    if line.endswith(b"\r"):
        return "expected the line to end with LF, found CRLF. Convert the file (git: core.autocrlf=false)"
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=reject_duplicate_keys)
    except UnicodeDecodeError as error:
        return f"expected UTF-8, found byte {line[error.start]:#04x} at column {error.start + 1}. Convert the file"
    except json.JSONDecodeError as error:
        return f"expected one JSON object, found: {error.msg} at column {error.colno}. Correct the line"
    except DuplicateKey as error:
        return f"expected every key once, found {error} twice. Correct the line"
    except (RecursionError, ValueError):
        return "expected one JSON object, found deeply nested brackets or a number beyond any real one. Correct the line"
    if not isinstance(row, dict) or set(row) != {"domain", "text"}:
        found = (
            ", ".join(map(shorten_repr, [*row][:8]))
            if isinstance(row, dict)
            else type(row).__name__
        )
        return f"expected the keys domain and text and no other, found {found or 'none'}"
    domain, text = row["domain"], row["text"]
    if domain not in domains:
        return f"domain: expected {' or '.join(domains)}, found {shorten_repr(domain)}. Correct it, or `domains` in the spec"
    if not isinstance(text, str) or not text.strip():
        return f"text: expected text, found {shorten_repr(text)}"
    if not is_encodable(text):
        return "text: expected text, found half a surrogate pair (\\ud800 to \\udfff). Correct the line"
    return Document(domain=domain, text=text)


def bound_sequences(spec: Spec, length: int) -> int | None:
    """Documents of a set, or an upper bound of its windows of `length` tokens; None for a set that is not here."""
    if spec.file is None or not spec.file.is_file():
        return None
    if (
        spec.packing == "windows"
    ):  # a token has at least one byte; BOS in front of a window is not of the text
        return spec.file.stat().st_size // max(1, length - 1)
    with spec.file.open("rb") as lines:
        return sum(1 for _ in lines)


def read_local(spec: Spec) -> tuple[tuple[Document, ...], str]:
    """The local text that stands in for a data set of the hub: one row a line, as the hub has it."""
    local, hub = cast(LocalText, spec.local), cast(HubSet, spec.hub)
    path = cast(Path, local.path)
    data = read_bytes(path, LIMIT_BYTES, CalibrationError)
    _checked_sha256(data, local.sha256, path, spec.where)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: expected UTF-8, found byte {data[error.start]:#04x}. Restore the file"
        ) from None
    rows = [line + "\n" for line in text.removesuffix("\n").split("\n")]
    return _hub_documents([row if row.strip() else "" for row in rows], hub)


def read_hub(spec: Spec) -> tuple[tuple[Document, ...], str]:
    """The rows of a data set of the hub at the spec's revision; CalibrationError when it cannot be had."""
    import datasets

    hub = cast(HubSet, spec.hub)
    load = cast(Callable[..., Any], datasets.load_dataset)
    try:
        rows = load(hub.path, hub.name, split=hub.split, revision=hub.revision)
        texts = [str(text) for text in rows[hub.column]]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        local = spec.local
        other = (
            f", set {DATA_VARIABLE} to a folder that holds {local.file}"
            if local is not None
            else ""
        )
        raise CalibrationError(
            f"{spec.where}: datasets: expected {hub.path} {hub.name} {hub.split} at {hub.revision[:12]} from the hub, "
            f"found: {first_line(error)}. Connect once so that it is cached{other}, or choose a set that is a file"
        ) from error
    return _hub_documents(texts, hub)


def _hub_documents(rows: list[str], hub: HubSet) -> tuple[tuple[Document, ...], str]:
    """Rows as documents, empty ones kept (windows join them), and the sha256 of all rows."""
    digest = hashlib.sha256("\n".join(rows).encode("utf-8")).hexdigest()
    return tuple(Document(domain=hub.domain, text=row) for row in rows), digest
