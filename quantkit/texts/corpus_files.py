"""The documents of a set: JSON lines, a local text file, or a data set of the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
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
from quantkit.texts.builtin_text import read_builtin
from quantkit.texts.chats import Chat
from quantkit.texts.corpus_spec import (
    DATA_VARIABLE,
    CorpusSpec,
    HubDataset,
    LocalText,
    raise_faults,
    read_spec,
)
from quantkit.texts.hub_data import DataSetFault, bound_data_set, translate_library_faults
from quantkit.texts.mixture_spec import HubRows, LabelledText, PartSpec
from quantkit.texts.text_rows import MAX_BYTES, RowReader, TextRows, read_text_rows

DOCUMENT_JOIN = "\n\n"
"""Between documents of a window; the usual choice for wikitext's perplexity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDocument:
    """One text, and the domain under which its scores are reported."""

    domain: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusPart:
    """A part of a mixture with its documents or chats; `skipped` counts its rows without any.

    labels: one per text, for a part with labels of its own. Then a text is an answer of the model,
    or a whole file of `texts`.
    """

    spec: PartSpec
    texts: tuple[str, ...]
    chats: tuple[Chat, ...]
    skipped: int
    sha256: str
    labels: tuple[str, ...] = ()


SelfSampler = Callable[[CorpusSpec, PartSpec], CorpusPart]
"""Samples the text of a part with `self` from the model."""


def read_set(spec: CorpusSpec) -> tuple[tuple[TextDocument, ...], str]:
    """Read the documents of a set that is no mixture, and their sha256."""
    if spec.file is not None:
        return read_documents(spec)
    if spec.local is not None and spec.local.path is not None:
        return read_local_text(spec)
    return read_hub_dataset(spec)


def read_parts(
    spec: CorpusSpec, folder: Path, sample_self: SelfSampler | None = None
) -> tuple[CorpusPart, ...]:
    """Read every part of a mixture; `folder` holds the sets that parts name.

    Raises CalibrationError with spec, part and what to do.
    """
    return tuple(_read_part(spec, part, folder, sample_self) for part in spec.parts)


def _read_part(
    spec: CorpusSpec, part: PartSpec, folder: Path, sample_self: SelfSampler | None
) -> CorpusPart:
    where = f"{spec.where}: part {part.name}"
    if part.sampled is not None:
        if sample_self is None:
            raise CalibrationError(
                f"{where}: self: expected a model that samples the text, found none. Use this set "
                "in a recipe"
            )
        return sample_self(spec, part)
    if part.set is not None:
        return _read_part_of_set(where, part, folder)
    if part.texts is not None:
        return _read_labelled_texts(where, part, part.texts)
    if (rows := _read_builtin(spec, part)) is not None:
        return CorpusPart(spec=part, texts=rows.texts, chats=(), skipped=0, sha256=rows.sha256)
    path, reader = part.file, _make_reader(part)
    local = part.local_path
    if part.local is not None and local is not None and local.exists():
        path = local
        reader = replace(
            reader, template=part.local.template or part.template, skip=part.local.skip
        )
    if path is not None:
        rows = _read_file_rows(path, reader, part.rows, part.sha256, where)
    elif part.hub is not None:
        rows = read_hub_rows(where, part)
    else:
        assert part.local is not None  # the only place that is left
        raise CalibrationError(
            f"{where}: local: expected {part.local.file} in the folder {DATA_VARIABLE}, found "
            f"{'no such file' if local else 'no such variable'}. Set {DATA_VARIABLE} to a folder "
            "that holds it, or choose another set"
        )
    if not rows.texts and not rows.chats:
        expected, key = ("text", "template") if part.messages is None else ("answers", "messages")
        raise CalibrationError(
            f"{where}: expected {expected}, found {rows.skipped:,} rows without any. Correct "
            f"`{key}`"
        )
    return CorpusPart(
        spec=part, texts=rows.texts, chats=rows.chats, skipped=rows.skipped, sha256=rows.sha256
    )


def _read_file_rows(
    path: Path, reader: RowReader, limit: int, sha256: str | None, where: str
) -> TextRows:
    """Read the rows of a file or a folder, and check its hash if the spec states one."""
    rows = read_text_rows(path, reader, limit)
    if sha256 is not None and rows.sha256 != sha256:
        raise CalibrationError(
            f"{path}: expected sha256 {sha256} ({where}), found {rows.sha256}. Restore "
            "the file, or state the new hash if you changed it on purpose"
        )
    return rows


def _read_labelled_texts(where: str, part: PartSpec, texts: tuple[LabelledText, ...]) -> CorpusPart:
    """Read the files of `texts`: one text per file, its paragraphs joined by blank lines."""
    files = [
        _read_file_rows(text.path, RowReader(), part.rows, text.sha256, where) for text in texts
    ]
    return CorpusPart(
        spec=part,
        texts=tuple(DOCUMENT_JOIN.join(rows.texts) for rows in files),
        chats=(),
        skipped=sum(rows.skipped for rows in files),
        sha256=part.sha256 or "",
        labels=tuple(text.label for text in texts),
    )


def _make_reader(part: PartSpec) -> RowReader:
    """Return the reader of a part's rows."""
    return RowReader(
        template=part.template,
        messages=part.messages,
        skip_unreadable=part.refused == "skip",
    )


def _read_builtin(spec: CorpusSpec, part: PartSpec) -> TextRows | None:
    """Read a built-in text; None if the part has its text from another place."""
    if part.builtin is None or part.draw is None:
        return None
    where = f"{spec.where}: part {part.name}"
    documents = read_builtin(part.builtin, part.draw, where)
    return make_rows([{"text": text} for text in documents], part, where)


def find_part_sha256(spec: CorpusSpec, part: PartSpec) -> str | None:
    """Return the sha256 of a part: of its built-in text, or as the spec states it, or None."""
    rows = _read_builtin(spec, part)
    return part.sha256 if rows is None else rows.sha256


def _read_part_of_set(where: str, part: PartSpec, folder: Path) -> CorpusPart:
    other = read_spec(str(part.set), folder)
    if other.parts:
        raise CalibrationError(
            f"{where}: set: expected a set without parts, found the mixture {other.name}. List its "
            "parts here"
        )
    if part.domain is not None and part.domain not in other.domains:
        raise CalibrationError(
            f"{where}: domain: expected {' or '.join(other.domains)}, the domains of {other.name}, "
            f"found {shorten_repr(part.domain)}"
        )
    documents, sha256 = read_set(other)
    texts = tuple(row.text for row in documents if part.domain in (None, row.domain))
    return CorpusPart(spec=part, texts=texts, chats=(), skipped=0, sha256=sha256)


def read_hub_rows(where: str, part: PartSpec) -> TextRows:
    """Read the first rows of a part's data set on the hub, as a stream.

    Raises CalibrationError if the data set is neither reachable nor cached.
    """
    import datasets

    hub = cast(HubRows, part.hub)
    load = cast(Callable[..., Any], datasets.load_dataset)
    try:
        with translate_library_faults(), bound_data_set():
            stream = load(
                hub.path, hub.name, split=hub.split, revision=hub.revision, streaming=True
            )
            return make_rows(islice(stream, part.rows), part, where)
    except DataSetFault as error:
        raise CalibrationError(
            f"{where}: datasets: expected {hub.path} {hub.name or ''} {hub.split} at "
            f"{hub.revision[:12]} from the hub, found: {str(error):.300}. Connect to "
            f"the hub, add `local` and set {DATA_VARIABLE}, or remove the part"
        ) from error


def make_rows(rows: Iterable[Mapping[str, Any]], part: PartSpec, where: str) -> TextRows:
    """Return the documents or chats that a part makes of rows, and their sha256."""
    texts, chats, skipped = _make_reader(part).read(rows, where, part.rows)
    # values of other keys may be dates
    content = "\0".join(texts) if texts else json.dumps([*map(_list_parts, chats)], default=str)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return TextRows(texts=tuple(texts), chats=tuple(chats), skipped=skipped, sha256=digest)


def _list_parts(chat: Chat) -> Sequence[object]:
    """Return the messages of a chat, with its tools if it has any."""
    return [chat.messages, chat.tools] if chat.tools else chat.messages


def read_documents(spec: CorpusSpec) -> tuple[tuple[TextDocument, ...], str]:
    """Read the set's JSON lines file; return its documents and its sha256, equal to the spec's."""
    path = cast(Path, spec.file)
    if not is_file(path):
        raise CalibrationError(
            f"{spec.where}: file: expected {path}, found no such file. Correct the key"
        )
    data = read_bytes(path, MAX_BYTES, CalibrationError)
    documents = parse_jsonl(data, str(path), spec.domains)
    absent = [
        domain
        for domain in spec.domains
        if all(document.domain != domain for document in documents)
    ]
    if absent:
        raise CalibrationError(
            f"{path}: expected documents of every domain in {spec.where}, "
            f"found none of {', '.join(absent)}. Correct `domains`"
        )
    return documents, _check_sha256(data, spec.sha256, path, spec.where)


def _check_sha256(data: bytes, expected: str, path: Path, where: Path) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != expected:
        raise CalibrationError(
            f"{path}: expected sha256 {expected} ({where}), found {sha256}. "
            f"Restore the file, or state the new hash if you changed it on purpose"
        )
    return sha256


def parse_jsonl(data: bytes, where: str, domains: tuple[str, ...]) -> tuple[TextDocument, ...]:
    """Parse a JSON lines file: UTF-8 without byte order mark, LF line ends, no empty line.

    Raises CalibrationError with the faults as `where:line`.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise CalibrationError(
            f"{where}:1: expected UTF-8 without a byte order mark, found one. Save it without"
        )
    documents: list[TextDocument] = []
    faults: list[str] = []
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], start=1):
        result = _parse_row(line, domains)
        if isinstance(result, TextDocument):
            documents.append(result)
        else:
            faults.append(f"{where}:{number}: {result}")
    if not data:
        faults.append(f"{where}:1: expected at least one row, found an empty file")
    raise_faults(faults)
    return tuple(documents)


def _parse_row(line: bytes, domains: tuple[str, ...]) -> TextDocument | str:
    """Return the document in a line, or the sentence that describes its fault."""
    if line.endswith(b"\r"):
        return (
            "expected the line to end with LF, found CRLF. Convert the file (git: "
            "core.autocrlf=false)"
        )
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=reject_duplicate_keys)
    except UnicodeDecodeError as error:
        return (
            f"expected UTF-8, found byte {line[error.start]:#04x} at column {error.start + 1}. "
            "Convert the file"
        )
    except json.JSONDecodeError as error:
        return (
            f"expected one JSON object, found: {error.msg} at column {error.colno}. Correct the "
            "line"
        )
    except DuplicateKey as error:
        return f"expected every key once, found {error} twice. Correct the line"
    except (RecursionError, ValueError):
        return (
            "expected one JSON object, found deeply nested brackets or a number out of range. "
            "Correct the line"
        )
    if not isinstance(row, dict) or set(row) != {"domain", "text"}:
        keys = (
            ", ".join(map(shorten_repr, [*row][:8]))
            if isinstance(row, dict)
            else type(row).__name__
        )
        return f"expected the keys domain and text and no other, found {keys or 'none'}"
    domain, text = row["domain"], row["text"]
    if domain not in domains:
        return (
            f"domain: expected {' or '.join(domains)}, found {shorten_repr(domain)}. Correct it, "
            "or `domains` in the spec"
        )
    if not isinstance(text, str) or not text.strip():
        return f"text: expected text, found {shorten_repr(text)}"
    if not is_encodable(text):
        return (
            "text: expected text, found half a surrogate pair (\\ud800 to \\udfff). Correct the "
            "line"
        )
    return TextDocument(domain=domain, text=text)


def bound_sequences(
    spec: CorpusSpec, length: int, shares: Mapping[str, float] | None = None
) -> int | None:
    """Return the number of documents, or an upper bound of the windows of `length` tokens.

    None if the set's file is not on this machine. Of a mixture only built-in parts are bounded;
    shares: those with which its parts are sampled, by default those of the spec.
    """
    if spec.parts:
        shares = shares or {part.name: part.share for part in spec.parts}
        bounds = [
            # rounding takes less than one sequence per part from a share
            int((n_tokens // max(1, length - 1) + len(spec.parts)) / shares[part.name])
            for part in spec.parts
            if (n_tokens := _bound_part_tokens(spec, part)) is not None
        ]
        return min(bounds, default=None)
    if spec.file is None or not spec.file.is_file():
        return None
    if spec.packing == "windows":  # a token has at least one byte; BOS is not part of the text
        return spec.file.stat().st_size // max(1, length - 1)
    with spec.file.open("rb") as lines:
        return sum(1 for _ in lines)


def bound_mixture_tokens(spec: CorpusSpec) -> int | None:
    """Return an upper bound of a mixture's tokens; None if a part has no built-in text."""
    counts = [_bound_part_tokens(spec, part) for part in spec.parts]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _bound_part_tokens(spec: CorpusSpec, part: PartSpec) -> int | None:
    """Return an upper bound of a part's tokens: its bytes, and two per document.

    Between documents are blank lines, or BOS and EOS.
    """
    if part.texts is not None and all(is_file(text.path) for text in part.texts):
        return sum(text.path.stat().st_size for text in part.texts)
    rows = _read_builtin(spec, part)
    return None if rows is None else sum(len(text.encode()) + 2 for text in rows.texts)


def read_local_text(spec: CorpusSpec) -> tuple[tuple[TextDocument, ...], str]:
    """Read the local text that replaces a data set of the hub: one row per line, as on the hub."""
    local, hub = cast(LocalText, spec.local), cast(HubDataset, spec.hub)
    path = cast(Path, local.path)
    data = read_bytes(path, MAX_BYTES, CalibrationError)
    _check_sha256(data, local.sha256, path, spec.where)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: expected UTF-8, found byte {data[error.start]:#04x}. Restore the file"
        ) from None
    rows = [line + "\n" for line in text.removesuffix("\n").split("\n")]
    return _make_hub_documents([row if row.strip() else "" for row in rows], hub)


def read_hub_dataset(spec: CorpusSpec) -> tuple[tuple[TextDocument, ...], str]:
    """Read the rows of a data set of the hub at the spec's revision.

    Raises CalibrationError if it is neither reachable nor cached.
    """
    import datasets

    hub = cast(HubDataset, spec.hub)
    load = cast(Callable[..., Any], datasets.load_dataset)
    try:
        with translate_library_faults(), bound_data_set():
            rows = load(hub.path, hub.name, split=hub.split, revision=hub.revision)
            texts = _collect_texts(rows, spec, hub)
    except DataSetFault as error:
        local = spec.local
        advice = f", set {DATA_VARIABLE} to a folder that holds {local.file}" if local else ""
        raise CalibrationError(
            f"{spec.where}: datasets: expected {hub.path} {hub.name} {hub.split} at "
            f"{hub.revision[:12]} from the hub, found: {str(error):.300}. Connect once so "
            f"that it is cached{advice}, or choose a set that is a file"
        ) from error
    return _make_hub_documents(texts, hub)


def _collect_texts(rows: Any, spec: CorpusSpec, hub: HubDataset) -> list[str]:
    """Return the texts of the column, at most MAX_BYTES of them."""
    texts, n_characters = list[str](), 0
    for number, text in enumerate(rows[hub.column], start=1):
        if not isinstance(text, str):
            raise CalibrationError(
                f"{spec.where}: datasets: row {number}: {hub.column}: expected text, found "
                f"{shorten_repr(text)}. Name another column, or use a mixture with `template` or "
                "`messages`"
            )
        texts.append(text)
        n_characters += len(texts[-1])
        if n_characters > MAX_BYTES:
            raise CalibrationError(
                f"{spec.where}: datasets: expected at most {MAX_BYTES:,} characters of text in "
                f"{hub.path}, found more. Choose a smaller split"
            )
    return texts


def _make_hub_documents(rows: list[str], hub: HubDataset) -> tuple[tuple[TextDocument, ...], str]:
    """Return rows as documents, empty ones included (windows join them), and their sha256."""
    digest = hashlib.sha256("\n".join(rows).encode("utf-8")).hexdigest()
    return tuple(TextDocument(domain=hub.domain, text=row) for row in rows), digest
