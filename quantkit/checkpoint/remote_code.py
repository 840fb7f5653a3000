"""Code that comes with a model (`auto_map`): when a tokenizer's may run, and that nothing else does.

An artifact carries such files over as they are. quantkit never runs the code of an architecture: what it streams are
transformers' own layers. A tokenizer that exists as code alone may run where the recipe names the commit that somebody
has read, and the files are those of that commit: the Hub's cache keeps them in `snapshots/<commit>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from quantkit.checkpoint.file_names import CONFIG
from quantkit.errors import CheckpointError, UsageError
from quantkit.io.files import is_file, read_json, shorten_repr

KEY = "source.trust_remote_code"
_FILES = ("tokenizer_config.json", CONFIG)


def allows_remote_code(allowed: str | None, folder: Path) -> bool:
    """Whether the tokenizer in `folder` may run code of its own; `allowed`: the recipe's commit.

    Raises UsageError when the files are not known to be of that commit, CheckpointError when they name code elsewhere.
    """
    if allowed is None:
        return False
    found = folder.name if folder.parent.name == "snapshots" else None
    if found != allowed:
        told = f"commit {found}" if found else f"{folder}, a folder of no known commit"
        raise UsageError(
            f"{KEY}: expected the files of commit {allowed}, found {told}; set source.revision to the commit whose "
            "code you have read, or remove the key"
        )
    for file, name in _mapped(folder):
        if "--" in name:
            raise CheckpointError(
                f"{folder / file}: auto_map: expected code in this model's own files, found {shorten_repr(name)} of another "
                "repository, which no commit of this one vouches for; do without it"
            )
    return True


def read_tokenizer_map(folder: Path) -> dict[str, object]:
    """The part of config.json's auto_map that names a tokenizer."""
    found = read_json(folder / CONFIG).get("auto_map") if is_file(folder / CONFIG) else None
    return (
        {"AutoTokenizer": found["AutoTokenizer"]}
        if isinstance(found, dict) and "AutoTokenizer" in found
        else {}
    )


def format_trust_hint(folder: Path) -> str:
    """What to add to the refusal of a tokenizer that has code of its own; nothing for others."""
    if not any(True for _ in _mapped(folder)):
        return ""
    return f". It has code of its own, which never runs unless {KEY} names the Hub's commit that you have read"


def _mapped(folder: Path) -> Iterator[tuple[str, str]]:
    """File and class of each tokenizer that exists as code."""
    for file in _FILES:
        if not is_file(folder / file):
            continue
        try:
            found = read_json(folder / file).get("auto_map")
        except CheckpointError:
            continue  # told by whoever needs the file
        entry = found.get("AutoTokenizer") if isinstance(found, Mapping) else found
        for name in entry if isinstance(entry, list) else [entry]:
            if isinstance(name, str):
                yield file, name
