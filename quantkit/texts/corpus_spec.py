"""The YAML spec of a set of documents: its keys, checked, with every fault named by file, line and key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, cast

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from quantkit.errors import CalibrationError, UsageError
from quantkit.io import safe_yaml
from quantkit.io.files import is_file, read_bytes, shorten_repr

Packing = Literal["documents", "windows"]

DOMAINS = ("prose", "math", "code")
PACKINGS = ("documents", "windows")
DATA_VARIABLE = "QUANTKIT_DATA"
SHOWN_FAULTS = 8
MOST_CHARACTERS = 2000  # of a value


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSet:
    """A column of text of a data set on the hub, at a fixed revision."""

    path: str
    name: str
    split: str
    revision: str
    column: str
    domain: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalText:
    """The same text as one file; `path` is None when QUANTKIT_DATA does not hold it."""

    file: str
    sha256: str
    path: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A checked spec; either `file` with `sha256`, or `hub`, which `local` may stand in for."""

    where: Path
    name: str
    licence: str
    origin: str
    domains: tuple[str, ...]
    packing: Packing
    end_of_document: bool
    file: Path | None
    sha256: str
    hub: HubSet | None
    local: LocalText | None


SPEC_KEYS = (
    "version",
    "name",
    "licence",
    "origin",
    "domains",
    "packing",
    "end",
    "file",
    "sha256",
    "datasets",
    "local",
)
HUB_KEYS = ("path", "name", "split", "revision", "column", "domain")
LOCAL_KEYS = ("file", "sha256")


def read_spec(name_or_path: str, folder: Path) -> Spec:
    """Find and check the spec of a set; CalibrationError lists every fault with its line."""
    where = _find(name_or_path, folder)
    faults: list[str] = []
    keys = _Keys(_load_yaml(where), where, faults)
    keys.known(SPEC_KEYS)
    keys.choice("version", (1,))
    domains = keys.domains()
    packing = keys.choice("packing", PACKINGS)
    end = keys.choice("end", ("eos", "none"), default="none")
    if packing == "windows" and end == "eos":
        keys.fault("end", "expected none with `packing: windows`, found eos. Remove the key")
    hub, local = _hub(keys, domains), _local(keys)
    file = None if "datasets" in keys.values else keys.text("file")
    spec = Spec(
        where=where,
        name=keys.text("name"),
        licence=keys.text("licence"),
        origin=keys.text("origin"),
        domains=domains,
        packing=cast(Packing, packing),
        end_of_document=end == "eos",
        file=None if file is None else where.parent / file,
        sha256="" if file is None else keys.sha256(),
        hub=hub,
        local=local,
    )
    if "datasets" in keys.values and "file" in keys.values:
        keys.fault("file", "expected either `file` or `datasets`, found both. Remove one")
    if "local" in keys.values and "datasets" not in keys.values:
        keys.fault(
            "local",
            "expected a `datasets` entry that the local text stands in for. Use `file` instead",
        )
    raise_faults(faults)
    return spec


def raise_faults(faults: list[str]) -> None:
    """Raise the collected faults as one CalibrationError, the first few written out."""
    if faults:
        more = (
            [f"and {len(faults) - SHOWN_FAULTS} more faults"] if len(faults) > SHOWN_FAULTS else []
        )
        raise CalibrationError("\n".join([*faults[:SHOWN_FAULTS], *more]))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a full stop; its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _find(name_or_path: str, folder: Path) -> Path:
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
        f"Known: {', '.join(known) or 'none'}; or give the path of a .yaml spec"
    )


def _load_yaml(path: Path) -> CommentedMap:
    try:
        text = read_bytes(path, safe_yaml.MAX_CHARACTERS, CalibrationError).decode("utf-8")
        safe_yaml.load(text)
        data = YAML(typ="rt").load(text)  # which knows the line of each key
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: expected UTF-8, found byte {error.object[error.start]:#04x}"
        ) from error
    except safe_yaml.UnreadableYaml as error:
        line = f":{error.line}" if error.line else ""
        raise CalibrationError(
            f"{path}{line}: expected YAML, found: {error}. Correct the file"
        ) from error
    except (YAMLError, *safe_yaml.PARSER_ERRORS) as error:
        raise CalibrationError(
            f"{path}: expected YAML, found: {first_line(error)}. Correct the file"
        ) from error
    if not isinstance(data, CommentedMap):
        raise CalibrationError(
            f"{path}:1: expected keys and values, found {type(data).__name__}. See calibration/"
        )
    return data


@dataclass(frozen=True, slots=True)
class _Keys:
    """Typed access to a mapping of a YAML file; faults are collected with file and line."""

    values: CommentedMap
    where: Path
    faults: list[str]
    prefix: str = ""

    def fault(self, key: str, text: str) -> None:
        line = self.values.lc.line if key not in self.values else self.values.lc.key(key)[0]
        self.faults.append(f"{self.where}:{line + 1}: {self.prefix}{key!s:.80}: {text}")

    def known(self, keys: Iterable[str]) -> None:
        allowed = tuple(keys)
        for key in self.values:
            if key not in allowed:
                close = get_close_matches(str(key), allowed, n=1)
                hint = (
                    f"Did you mean {close[0]!r}?" if close else f"Use one of {', '.join(allowed)}"
                )
                self.fault(key, f"unknown key. {hint}")

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip() or len(value) > MOST_CHARACTERS:
            self.fault(
                key, f"expected text, found {'nothing' if value is None else shorten_repr(value)}"
            )
            return ""
        return str(value).strip()

    def choice(self, key: str, options: tuple[object, ...], default: object = None) -> object:
        value = self.values.get(key, default)
        if value not in options or isinstance(value, bool):
            shown = " or ".join(str(option) for option in options)
            self.fault(
                key,
                f"expected {shown}, found {'nothing' if value is None else shorten_repr(value)}",
            )
            return options[0]
        return value

    def domains(self) -> tuple[str, ...]:
        value = self.values.get("domains")
        if not isinstance(value, list) or not value or len(set(map(str, value))) != len(value):
            self.fault(
                "domains",
                f"expected a list without repetition of {', '.join(DOMAINS)}, found {shorten_repr(value)}",
            )
            return ()
        for domain in value:
            if domain not in DOMAINS:
                self.fault(
                    "domains",
                    f"unknown domain {shorten_repr(domain)}. Use one of {', '.join(DOMAINS)}",
                )
        return tuple(domain for domain in value if domain in DOMAINS)

    def sha256(self) -> str:
        value = self.text("sha256").lower()
        if value and not re.fullmatch(r"[0-9a-f]{64}", value):
            self.fault("sha256", f"expected 64 hexadecimal digits, found {shorten_repr(value)}")
        return value

    def section(self, key: str, keys: tuple[str, ...]) -> _Keys | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, CommentedMap):
            self.fault(key, f"expected keys {', '.join(keys)}, found {shorten_repr(value)}")
            return None
        inner = _Keys(value, self.where, self.faults, prefix=f"{key}.")
        inner.known(keys)
        return inner


def _hub(keys: _Keys, domains: tuple[str, ...]) -> HubSet | None:
    section = keys.section("datasets", HUB_KEYS)
    if section is None:
        return None
    path, name, split, revision, column, domain = (section.text(key) for key in HUB_KEYS)
    if domain and domains != (domain,):
        section.fault(
            "domain",
            f"expected the one domain of the set, found {shorten_repr(domain)} and {list(domains)}",
        )
    return HubSet(
        path=path, name=name, split=split, revision=revision, column=column, domain=domain
    )


def _local(keys: _Keys) -> LocalText | None:
    section = keys.section("local", LOCAL_KEYS)
    if section is None:
        return None
    file, sha256 = section.text("file"), section.sha256()
    folder = os.environ.get(DATA_VARIABLE)
    path = Path(folder) / file if folder else None
    return LocalText(
        file=file, sha256=sha256, path=path if path is not None and is_file(path) else None
    )
