"""The YAML spec of a set: every key with its type, every fault with file, line and key."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from quantkit.errors import CalibrationError, RecipeError, UsageError
from quantkit.io import yaml_document
from quantkit.io.files import is_file, read_bytes
from quantkit.io.files import shorten_repr as shorten_repr
from quantkit.io.validation_errors import describe_fault
from quantkit.io.yaml_document import KeyPath, YamlDocument, format_path
from quantkit.texts.data_names import check_dataset_name
from quantkit.texts.mixture_spec import (
    FROZEN,
    MIXTURE_SECTIONS,
    InnerPath,
    MixtureFile,
    Packing,
    PartSpec,
    Text,
    check_end,
    make_parts,
)
from quantkit.texts.plain_files import make_plain_mixture, parse_plain_file

Domain = Literal["prose", "math", "code"]

DOMAINS: tuple[Domain, ...] = ("prose", "math", "code")
DATA_VARIABLE = "QUANTKIT_DATA"
KIND = "spec of a set"
MAX_SHOWN_FAULTS = 8
MAX_BYTES = 4 * yaml_document.MAX_CHARACTERS


def _check_distinct(domains: tuple[Domain, ...]) -> tuple[Domain, ...]:
    repeated = sorted({domain for domain in domains if domains.count(domain) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: listed twice; list every domain once")
    return domains


def _lower_text(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Sha256 = Annotated[str, BeforeValidator(_lower_text), Field(pattern="^[0-9a-f]{64}$")]
Domains = Annotated[
    tuple[Domain, ...], Field(strict=False, min_length=1), AfterValidator(_check_distinct)
]


class HubDataset(BaseModel):
    """A text column of a data set on the hub, at a fixed revision."""

    model_config = FROZEN
    path: Annotated[Text, AfterValidator(check_dataset_name)]
    name: Text
    split: Text
    revision: Text
    column: Text
    domain: Domain


class LocalTextFile(BaseModel):
    """The text of `datasets` as one file, by its path below QUANTKIT_DATA."""

    model_config = FROZEN
    file: InnerPath
    sha256: Sha256


class SpecFile(BaseModel):
    """The keys of a spec. Either `file` with `sha256`, or `datasets`, which `local` can replace."""

    model_config = FROZEN
    version: Literal[1]
    name: Text
    license: Text = Field(alias="licence")
    origin: Text
    domains: Domains
    packing: Packing
    end: Literal["eos", "none"] = "none"
    datasets: HubDataset | None = None
    local: LocalTextFile | None = None
    file: InnerPath | None = Field(default=None, validate_default=True)
    sha256: Sha256 | None = Field(default=None, validate_default=True)

    @field_validator("version", mode="before")
    @classmethod
    def _check_version(cls, version: object) -> object:
        if version != 1:
            raise ValueError(f"expected 1, or 2 for a mixture, found {shorten_repr(version)}")
        return version

    _check_end = field_validator("end")(check_end)

    @field_validator("local")
    @classmethod
    def _check_local(
        cls, local: LocalTextFile | None, info: ValidationInfo
    ) -> LocalTextFile | None:
        if local is not None and info.data.get("datasets", "faulty") is None:
            raise ValueError(
                "expected a `datasets` entry that the local text replaces. Use `file` instead"
            )
        return local

    @field_validator("file")
    @classmethod
    def _check_file(cls, file: str | None, info: ValidationInfo) -> str | None:
        datasets = info.data.get("datasets", "faulty")
        if file is not None and datasets is not None:
            raise ValueError("expected either `file` or `datasets`, found both. Remove one")
        if file is None and datasets is None:
            raise ValueError("expected either `file` or `datasets`, found neither. Add one")
        return file

    @field_validator("sha256")
    @classmethod
    def _check_sha256(cls, sha256: str | None, info: ValidationInfo) -> str | None:
        if sha256 is None and info.data.get("file") is not None:
            raise ValueError("expected the sha256 of `file`, found nothing. Add it")
        return sha256


SECTIONS: dict[str, type[BaseModel]] = {"datasets": HubDataset, "local": LocalTextFile}


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalText:
    """The text of `datasets` as one file; `path` is None if QUANTKIT_DATA does not hold it."""

    file: str
    sha256: str
    path: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSpec:
    """A checked spec with resolved paths: `file` with `sha256`, `hub` and optionally `local`, or
    the `parts` of a mixture, which have packing, end and text of their own.
    """

    where: Path
    name: str
    license: str
    origin: str
    domains: tuple[str, ...]
    packing: Packing
    end_of_document: bool
    file: Path | None
    sha256: str
    hub: HubDataset | None
    local: LocalText | None
    parts: tuple[PartSpec, ...] = ()


def read_spec(name_or_path: str, folder: Path) -> CorpusSpec:
    """Find, read and check the spec of a set, or make that of a text file.

    Raises UsageError if there is no such spec, CalibrationError with every fault and its line.
    """
    if (plain := parse_plain_file(name_or_path)) is not None:
        return _make_mixture(plain.path, make_plain_mixture(plain))
    where = _find_spec(name_or_path, folder)
    document = _read_document(where)
    if document.values.get("version") == 2:
        return _make_mixture(where, _parse_mixture(document))
    values = _parse_spec(document)
    return CorpusSpec(
        where=where,
        name=values.name,
        license=values.license,
        origin=values.origin,
        domains=values.domains,
        packing=values.packing,
        end_of_document=values.end == "eos",
        file=None if values.file is None else where.parent / values.file,
        sha256=values.sha256 or "",
        hub=values.datasets,
        local=None if values.local is None else _resolve_local(values.local),
    )


def _make_mixture(where: Path, values: MixtureFile) -> CorpusSpec:
    data = os.environ.get(DATA_VARIABLE)
    parts = make_parts(values, where.parent, Path(data) if data else None)
    return CorpusSpec(
        where=where,
        name=values.name,
        license=" AND ".join(dict.fromkeys(part.license for part in parts)),
        origin=", ".join(dict.fromkeys(part.origin for part in parts)),
        domains=tuple(dict.fromkeys(label for part in parts for label in part.labels)),
        packing="windows",
        end_of_document=False,
        file=None,
        sha256="",
        hub=None,
        local=None,
        parts=parts,
    )


def raise_faults(faults: Sequence[str]) -> None:
    """Raise one CalibrationError with the first few faults, if there are any."""
    if faults:
        more = len(faults) - MAX_SHOWN_FAULTS
        rest = [f"and {more} more faults"] if more > 0 else []
        raise CalibrationError("\n".join([*faults[:MAX_SHOWN_FAULTS], *rest]))


def get_first_line(error: BaseException) -> str:
    """Return the first line of an error's message without a full stop, or the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def is_shipped_set(name_or_path: str, folder: Path) -> bool:
    """Return whether a set is one of `folder`, not a file of the user's own."""
    return is_file(folder / f"{name_or_path}.yaml") and Path(name_or_path).name == name_or_path


def _find_spec(name_or_path: str, folder: Path) -> Path:
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not is_file(path):
            raise UsageError(
                f"{path}: expected the spec of a set, found no such file. Correct the path"
            )
        return path
    path = folder / f"{name_or_path}.yaml"
    if path.parent == folder and is_file(path):
        return path
    known = sorted(spec.stem for spec in folder.glob("*.yaml"))
    close = get_close_matches(name_or_path, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UsageError(
        f"{folder}: no set of documents named {shorten_repr(name_or_path)}.{hint} "
        f"Known: {', '.join(known) or 'none'}; or give the path of a .yaml spec or of a "
        ".jsonl, .parquet or .txt file"
    )


def _read_document(path: Path) -> YamlDocument:
    data = read_bytes(path, MAX_BYTES, CalibrationError)
    try:
        return yaml_document.parse_document(data.decode("utf-8"), str(path), KIND)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: expected UTF-8, found byte {data[error.start]:#04x}. Save the file as UTF-8"
        ) from error
    except RecipeError as error:
        raise_faults(error.faults)
        raise


def _parse_mixture(document: YamlDocument) -> MixtureFile:
    try:
        return MixtureFile.model_validate(document.values)
    except ValidationError as error:
        raise_faults(_list_faults(document, error, MixtureFile, MIXTURE_SECTIONS))
        raise


def _parse_spec(document: YamlDocument) -> SpecFile:
    try:
        values = SpecFile.model_validate(document.values)
    except ValidationError as error:
        raise_faults(_list_faults(document, error, SpecFile, SECTIONS))
        raise
    if values.datasets is not None and values.domains != (values.datasets.domain,):
        domain = values.datasets.domain
        raise CalibrationError(
            f"{document.where(('datasets', 'domain'))}: datasets.domain: expected the one domain "
            f"of the set, found {domain!r} and {list(values.domains)}. Correct `domains`"
        )
    return values


def _list_faults(
    document: YamlDocument,
    error: ValidationError,
    top: type[BaseModel],
    sections: Mapping[str, type[BaseModel]],
) -> list[str]:
    """Return one sentence per fault, in the order of their lines."""
    faults: list[tuple[int, str]] = []
    entries = error.errors(include_url=False)
    for details in entries:
        path: KeyPath = tuple(details["loc"])
        inner = any(path == other["loc"][: len(path)] != other["loc"] for other in entries)
        if details["type"] == "too_short" and inner:
            continue  # pydantic counts the faulty entries of a list as missing
        outer = [sections[key] for key in path[:-1] if isinstance(key, str) and key in sections]
        if path and details["type"] != "extra_forbidden":
            path = (*path[:-1], _find_key(outer[-1] if outer else top, path[-1]))
        if details["type"] == "model_type":
            keys = ", ".join(_list_keys(sections[str(path[0])]))
            sentence = f"expected the keys {keys}, found {shorten_repr(details['input'])}"
        else:
            sentence = describe_fault(path, details, _list_keys(outer[-1] if outer else top))
        faults.append((
            document.line(path),
            f"{document.where(path)}: {format_path(path)}: {sentence}",
        ))
    return [text for _, text in sorted(faults, key=lambda fault: fault[0])]


def _find_key(model: type[BaseModel], name: str | int) -> str | int:
    """Return the key of a field: pydantic names a field without a value by its attribute."""
    field = model.model_fields.get(str(name))
    return field.alias if field is not None and field.alias else name


def _list_keys(model: type[BaseModel]) -> tuple[str, ...]:
    return tuple(field.alias or name for name, field in model.model_fields.items())


def _resolve_local(local: LocalTextFile) -> LocalText:
    folder = os.environ.get(DATA_VARIABLE)
    path = Path(folder) / local.file if folder else None
    return LocalText(
        file=local.file,
        sha256=local.sha256,
        path=path if path is not None and is_file(path) else None,
    )
