"""Python code that comes with a model (`auto_map`): only a tokenizer's may run, on conditions.

An artifact carries over, unchanged, the modules that an auto_map names and the modules next to them
that these import relatively, as transformers loads them; no other Python file. quantkit never runs
an architecture's code: it streams through transformers' own layers. A tokenizer that exists only as
code may run if the recipe names the commit that the user has read and the files are of that commit:
the Hub's cache keeps them in `snapshots/<commit>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from quantkit.checkpoint.file_names import CONFIG
from quantkit.errors import CheckpointError, UsageError
from quantkit.io.files import is_file, read_json, read_prefix_at_most, shorten_repr

KEY = "source.trust_remote_code"
_FILES = ("tokenizer_config.json", CONFIG)
_MAPS = (*_FILES, "*preprocessor_config.json", "*processor_config.json")
"""Files whose auto_map names code."""
MAX_CODE_FILES = 100
"""Modules of a model; the largest have a dozen."""
MAX_CODE_BYTES = 2_000_000
"""Bytes of a module that are searched for imports; the largest have 200 kB."""
_CLASS = re.compile(r"(\w+)\.\w+", re.ASCII)
_IMPORT = re.compile(
    rb"^[ \t]*(?:from|import)[ \t]+\.(\w+)(?=[ \t]+import\b|[ \t]*$)", re.MULTILINE
)
"""The relative imports that transformers follows."""
_RUN_BY_TOOLS = re.compile(
    r"sitecustomize|usercustomize|conftest|setup|noxfile|test_\w*|\w*_test|__\w*"
)
"""Modules that Python, pytest and build tools run because of their name; no model needs one."""


def allows_remote_code(allowed: str | None, folder: Path) -> bool:
    """Return whether the tokenizer in `folder` may run its own code.

    allowed: the recipe's commit. Raises UsageError if the files may be of another commit,
    CheckpointError if they name code of another repository.
    """
    if allowed is None:
        return False
    commit = folder.name if folder.parent.name == "snapshots" else None
    if commit != allowed:
        actual = f"commit {commit}" if commit else f"{folder}, a folder of no known commit"
        raise UsageError(
            f"{KEY}: expected the files of commit {allowed}, found {actual}; set source.revision "
            "to the commit whose code you have read, or remove the key"
        )
    for file, name in _iterate_tokenizer_classes(folder):
        if "--" in name:
            raise CheckpointError(
                f"{folder / file}: auto_map: expected code in this model's own files, found "
                f"{shorten_repr(name)} of another repository, which no commit of this one vouches "
                "for; do without it"
            )
    return True


def list_code_files(folder: Path) -> tuple[str, ...]:
    """Return the Python files of a model that an artifact carries over, sorted.

    Raises CheckpointError for more than MAX_CODE_FILES of them.
    """
    pending, names = sorted(set(_iterate_modules(folder))), set[str]()
    while pending:
        module = pending.pop()
        file = f"{module}.py"
        if file in names or _RUN_BY_TOOLS.fullmatch(module) or not is_file(folder / file):
            continue
        names.add(file)
        if len(names) > MAX_CODE_FILES:
            raise CheckpointError(
                f"{folder}: auto_map: expected at most {MAX_CODE_FILES} files of code, found more; "
                "remove those that the model does not need"
            )
        text = read_prefix_at_most(folder / file, MAX_CODE_BYTES)
        pending += sorted({match.decode("ascii", "replace") for match in _IMPORT.findall(text)})
    return tuple(sorted(names))


def _iterate_modules(folder: Path) -> Iterator[str]:
    """Yield the module of each class that an auto_map names, except those of other
    repositories.
    """
    for path in (path for pattern in _MAPS for path in folder.glob(pattern) if is_file(path)):
        try:
            auto_map = read_json(path).get("auto_map")
        except CheckpointError:
            continue  # reported where the file is needed
        entries = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
        for entry in entries:
            for name in entry if isinstance(entry, list) else [entry]:
                if isinstance(name, str) and (match := _CLASS.fullmatch(name)):
                    yield match[1]


def read_tokenizer_map(folder: Path) -> dict[str, object]:
    """Return the tokenizer's part of config.json's auto_map."""
    auto_map = (
        read_json(folder / CONFIG, infinite=True).get("auto_map")
        if is_file(folder / CONFIG)
        else None
    )
    return (
        {"AutoTokenizer": auto_map["AutoTokenizer"]}
        if isinstance(auto_map, dict) and "AutoTokenizer" in auto_map
        else {}
    )


def format_trust_hint(folder: Path) -> str:
    """Return a hint to append to the refusal of a tokenizer with its own code; empty for others."""
    if not any(True for _ in _iterate_tokenizer_classes(folder)):
        return ""
    return (
        f". It has code of its own, which never runs unless {KEY} names the Hub's commit that you "
        "have read"
    )


def _iterate_tokenizer_classes(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield file and class of each tokenizer that exists as code."""
    for file in _FILES:
        if not is_file(folder / file):
            continue
        try:
            auto_map = read_json(folder / file).get("auto_map")
        except CheckpointError:
            continue  # reported where the file is needed
        entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, Mapping) else auto_map
        for name in entry if isinstance(entry, list) else [entry]:
            if isinstance(name, str):
                yield file, name
