"""The YAML spec of a mixture, version 2 of a set: parts with a share of the tokens, a kind and a
language each.

A part takes its text from one place: another set (`set`), a file or a folder (`file`), a data set
of the hub (`datasets`), text that quantkit makes or reads itself (`builtin`), the model to be
quantized (`self`), or several files with a kind and a language each (`texts`).
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from quantkit.texts.builtin_text import BuiltinName, describe_builtin
from quantkit.texts.data_names import check_dataset_name, check_inner_path
from quantkit.texts.interpreter_text import Draw
from quantkit.texts.self_prompts import (
    ENGLISH,
    SELF_KINDS,
    SELF_LANGUAGES,
    list_labels,
    make_label,
)

Packing = Literal["documents", "windows"]
PartPacking = Literal["documents", "windows", "chats"]
Count = Literal["answers", "all"]
"""Tokens of a chat that count: those of the assistant's messages, or all."""
Refused = Literal["stop", "skip"]
"""Treatment of a chat that quantkit or the chat template refuses: an error, or it is counted."""
FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True)

MAX_PARTS = 64
DEFAULT_ROWS = 20_000
MAX_ROWS = 5_000_000
KIND_PATTERN = "[a-z][a-z0-9_]{0,31}"
LANGUAGE_PATTERN = "[a-z]{2,3}(-[A-Za-z0-9]{2,8}){0,3}"
LABEL_PATTERN = f"{KIND_PATTERN}(-{LANGUAGE_PATTERN})?"
"""The form of the labels of `make_label`."""

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
InnerPath = Annotated[Text, AfterValidator(check_inner_path)]
Kind = Annotated[str, Field(pattern=f"^{KIND_PATTERN}$")]
Language = Annotated[str, Field(pattern=f"^{LANGUAGE_PATTERN}$")]
Share = Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False, strict=False)]
Rows = Annotated[int, Field(ge=1, le=MAX_ROWS)]


def _check_template(template: str) -> str:
    list_template_columns(template)
    return template


Template = Annotated[Text, AfterValidator(_check_template)]


def list_template_columns(template: str) -> tuple[str, ...]:
    """Return the columns that a template such as "{question}\\n{answer}" names.

    A template holds text and column names in braces; `{{` and `}}` are braces. Raises ValueError
    for anything else that `str.format` knows: attributes, indices, conversions, format specs.
    """
    columns = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if spec or conversion or not name.isidentifier():
            raise ValueError(
                "expected text with names of columns in braces, such as {question}, found "
                f"{name or 'empty braces'!r}. Name a column, or double the braces"
            )
        columns.append(name)
    if not columns:
        raise ValueError("expected the name of a column in braces, such as {text}, found none")
    return tuple(columns)


def check_end(end: str, info: ValidationInfo) -> str:
    """Return the end of a document, after the field `packing`; windows and chats have none."""
    packing = info.data.get("packing")
    if end == "eos" and packing in {"windows", "chats"}:
        raise ValueError(f"expected none with `packing: {packing}`, found eos. Remove the key")
    return end


class HubRows(BaseModel):
    """The first `rows` rows of a data set on the hub at a fixed revision, read as a stream."""

    model_config = FROZEN
    path: Annotated[Text, AfterValidator(check_dataset_name)]
    name: Text | None = None
    split: Text
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


class LocalRows(BaseModel):
    """A file by its path below QUANTKIT_DATA, without its first `skip` rows.

    It replaces `datasets` where that is given, too; `template` is that of the part by default.
    """

    model_config = FROZEN
    file: InnerPath
    sha256: Sha256 | None = None
    template: Template | None = None
    skip: Annotated[int, Field(ge=0, le=MAX_ROWS)] = 0


def _check_known(values: tuple[str, ...], known: Sequence[str]) -> tuple[str, ...]:
    if not set(values) <= set(known) or len(set(values)) < len(values):
        raise ValueError(f"expected some of {', '.join(known)}, found {', '.join(values)}")
    return values


class SelfText(BaseModel):
    """Text that the model to be quantized samples, of some kinds and languages."""

    model_config = FROZEN
    kinds: Annotated[
        tuple[Text, ...],
        Field(strict=False, min_length=1),
        AfterValidator(lambda values: _check_known(values, SELF_KINDS)),
    ] = SELF_KINDS
    languages: Annotated[
        tuple[Text, ...],
        Field(strict=False, min_length=1),
        AfterValidator(lambda values: _check_known(values, SELF_LANGUAGES)),
    ] = SELF_LANGUAGES

    @field_validator("languages")
    @classmethod
    def _check_prompts(cls, languages: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        kinds = info.data.get("kinds", SELF_KINDS)
        if not list_labels(kinds, languages):
            raise ValueError(
                f"expected a language with seed prompts of {', '.join(kinds)}, found "
                f"{', '.join(languages)}. Add a language or a kind"
            )
        return languages


class LabelledFile(BaseModel):
    """A plain text file with a kind and a language of its own."""

    model_config = FROZEN
    file: InnerPath
    sha256: Sha256
    kind: Kind
    language: Language = ENGLISH


def _check_files(files: tuple[LabelledFile, ...]) -> tuple[LabelledFile, ...]:
    labels = [make_label(file.kind, file.language) for file in files]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"{', '.join(repeated)}: two files of one kind and language; join them")
    return files


PLACES = ("set", "file", "datasets", "local", "builtin", "self", "texts")
ROW_PLACES = PLACES[1:4]
"""Places of rows with columns."""
NEEDS = {"domain": "set", "sha256": "file", "draw": "builtin"}
"""Keys that belong to a place."""
FIELDS = {"self": "sampled"}
"""Fields of places whose key is no name for a field."""
SELF_LICENSE = "model output"
SELF_ORIGIN = "sampled from the model itself"


class PartFile(BaseModel):
    """The keys of a part. Exactly one of the PLACES names its text."""

    model_config = FROZEN
    name: Kind
    kind: Kind
    language: Language = ENGLISH
    share: Share = 1.0
    sampled: Annotated[
        SelfText | None, BeforeValidator(lambda value: {} if value is True else value)
    ] = Field(default=None, alias="self")
    license: Text | None = Field(default=None, alias="licence", validate_default=True)
    origin: Text | None = None
    packing: PartPacking = "windows"
    end: Literal["eos", "none"] = "none"
    rows: Rows = DEFAULT_ROWS
    template: Template = "{text}"
    messages: Text | None = Field(default=None, validate_default=True)
    count: Count = "answers"
    refused: Refused = "stop"
    file: InnerPath | None = None
    sha256: Sha256 | None = None
    domain: Text | None = None
    datasets: HubRows | None = None
    local: LocalRows | None = None
    builtin: BuiltinName | None = None
    draw: Draw | None = None
    texts: Annotated[
        tuple[LabelledFile, ...] | None, Field(strict=False, min_length=1, max_length=MAX_PARTS)
    ] = None
    set: Text | None = Field(default=None, validate_default=True)

    _check_end = field_validator("end")(check_end)

    @field_validator("texts")
    @classmethod
    def _check_texts(
        cls, texts: tuple[LabelledFile, ...] | None, info: ValidationInfo
    ) -> tuple[LabelledFile, ...] | None:
        if texts is not None and info.data.get("packing", "windows") != "windows":
            raise ValueError("expected `packing: windows` with `texts`. Remove the key `packing`")
        if texts is not None and info.data.get("template", "{text}") != "{text}":
            raise ValueError("expected plain text with `texts`, found `template`. Remove the key")
        return texts and _check_files(texts)

    @field_validator("count", "refused")
    @classmethod
    def _check_chat_key(cls, value: str, info: ValidationInfo) -> str:
        is_default = value == cls.model_fields[info.field_name or ""].default
        if not is_default and info.data.get("messages", "faulty") is None:
            raise ValueError(
                f"expected `{info.field_name}: {value}` with `messages` only. Remove the key"
            )
        return value

    @field_validator("license")
    @classmethod
    def _check_license(cls, license: str | None, info: ValidationInfo) -> str | None:
        if license is None and info.data.get("sampled", "faulty") is None:
            raise ValueError("missing; this key has no default, except with `self`")
        return license

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, column: str | None, info: ValidationInfo) -> str | None:
        packing = info.data.get("packing", "chats" if column else "windows")
        if (column is not None) != (packing == "chats"):
            actual = "no `messages`" if column is None else f"`packing: {packing}`"
            raise ValueError(
                "expected the column with the messages together with `packing: chats`, found "
                f"{actual}. Add or remove one of both keys"
            )
        return column

    @field_validator("set")
    @classmethod
    def _check_text(cls, name: str | None, info: ValidationInfo) -> str | None:
        data = info.data
        fields = {key: FIELDS.get(key, key) for key in PLACES}
        if not {*fields.values(), *NEEDS, "messages"} - {"set"} <= data.keys():
            return name  # these keys have faults of their own
        values = {key: data.get(field) for key, field in fields.items()} | {"set": name}
        places = [key for key in PLACES if values[key] is not None]
        if "datasets" in places and "local" in places:
            places.remove("local")  # it replaces the data set
        if len(places) != 1:
            named = " and ".join(places) or "none of them"
            known = ", ".join(f"`{key}`" for key in PLACES)
            raise ValueError(f"expected one of {known}, found {named}")
        if data["messages"] is not None and places[0] not in ROW_PLACES:
            raise ValueError(f"`messages` belongs to rows, found it with `{places[0]}`")
        for key, place in NEEDS.items():
            if data[key] is not None and place not in places:
                raise ValueError(f"`{key}` belongs to `{place}`, found it with `{places[0]}`")
        if places == ["builtin"] and (data["draw"] is None or data["origin"] is not None):
            raise ValueError(
                "expected `builtin` with `draw: calibration` or `draw: heldout` and without "
                "`origin`, which it states itself"
            )
        return name


def _check_names(parts: tuple[PartFile, ...]) -> tuple[PartFile, ...]:
    names = [part.name for part in parts]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: two parts of one name; rename one")
    return parts


class MixtureFile(BaseModel):
    """The keys of a mixture."""

    model_config = FROZEN
    version: Literal[2]
    name: Text
    parts: Annotated[
        tuple[PartFile, ...],
        Field(strict=False, min_length=1, max_length=MAX_PARTS),
        AfterValidator(_check_names),
    ]


MIXTURE_SECTIONS: dict[str, type[BaseModel]] = {
    "parts": PartFile,
    "datasets": HubRows,
    "local": LocalRows,
    "self": SelfText,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledText:
    """A file of `texts`: its path, its hash, and the label of its scores."""

    path: Path
    sha256: str
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSpec:
    """A checked part: `share` is of the tokens, and the shares of a set add up to 1.

    Exactly one of `set`, `file`, `hub`, `local`, `builtin`, `sampled` and `texts` is not None, but
    `local` may replace `hub`; `local_path` is its path if QUANTKIT_DATA is set. The texts of
    `sampled` and `texts` have labels of their own.
    """

    name: str
    kind: str
    language: str
    share: float
    license: str
    origin: str
    packing: PartPacking
    end_of_document: bool
    rows: int
    template: str
    messages: str | None
    set: str | None
    domain: str | None
    file: Path | None
    sha256: str | None
    hub: HubRows | None
    local: LocalRows | None
    local_path: Path | None
    builtin: BuiltinName | None = None
    draw: Draw | None = None
    sampled: SelfText | None = None
    count: Count = "answers"
    texts: tuple[LabelledText, ...] | None = None
    refused: Refused = "stop"

    @property
    def labels(self) -> tuple[str, ...]:
        """All names under which scores of this part can be reported."""
        if self.texts is not None:
            return tuple(text.label for text in self.texts)
        if self.sampled is None:
            return (self.label,)
        return list_labels(self.sampled.kinds, self.sampled.languages)

    @property
    def label(self) -> str:
        """The name under which scores are reported: "web", or "web-zh" in another language."""
        return make_label(self.kind, self.language)


def make_parts(values: MixtureFile, folder: Path, data: Path | None) -> tuple[PartSpec, ...]:
    """Resolve the parts of a mixture: paths relative to `folder`, `local` below `data`."""
    total = sum(part.share for part in values.parts)
    return tuple(
        PartSpec(
            name=part.name,
            kind=part.kind,
            language=part.language,
            share=part.share / total,
            license=part.license or SELF_LICENSE,
            origin=_find_origin(part),
            packing=part.packing if part.sampled is None else "documents",
            end_of_document=part.end == "eos",
            rows=part.rows,
            template=part.template,
            messages=part.messages,
            set=part.set,
            domain=part.domain,
            file=None if part.file is None else folder / part.file,
            sha256=_find_sha256(part),
            hub=part.datasets,
            local=part.local,
            local_path=None if part.local is None or data is None else data / part.local.file,
            builtin=part.builtin,
            draw=part.draw,
            sampled=part.sampled,
            count=part.count,
            texts=_locate_texts(part, folder),
            refused=part.refused,
        )
        for part in values.parts
    )


def _find_sha256(part: PartFile) -> str | None:
    """Return the hash that a part states; of several files, the hash of their hashes."""
    if part.texts is not None:
        return hashlib.sha256("\n".join(text.sha256 for text in part.texts).encode()).hexdigest()
    return part.sha256 if part.local is None else part.local.sha256


def _locate_texts(part: PartFile, folder: Path) -> tuple[LabelledText, ...] | None:
    if part.texts is None:
        return None
    return tuple(
        LabelledText(
            path=folder / text.file,
            sha256=text.sha256,
            label=make_label(text.kind, text.language),
        )
        for text in part.texts
    )


def _find_origin(part: PartFile) -> str:
    if part.builtin is not None and part.draw is not None:
        return describe_builtin(part.builtin, part.draw)
    hub = part.datasets.path if part.datasets is not None else ""
    local = part.local.file if part.local is not None else ""
    own = SELF_ORIGIN if part.sampled is not None else ""
    files = f"{len(part.texts)} files" if part.texts is not None else ""
    return part.origin or part.file or part.set or hub or local or own or files
