"""A benchmark task as written in evals/: an lm-eval task behind a block `quantkit:` with its data
and code rules.

`load` reads and checks, `rendered` makes what lm-eval can read: the block is replaced by where the
data really is.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, StrictUndefined

from quantkit.errors import EvaluationError
from quantkit.io import safe_yaml
from quantkit.io.files import is_file, sha256_file, shorten_repr
from quantkit.texts import task_files

DATA_VARIABLE = "QUANTKIT_DATA"
TEMPLATES = Environment(
    undefined=StrictUndefined, keep_trailing_newline=True
)  # as lm-eval's: code, not HTML
_BLOCK = "quantkit"
_KEYS = ("domain", "local", "hub", "gold", "code")
_CODE_KEYS = ("source", "tests", "cut", "seconds")
_SPLIT = re.compile(r"\w[\w.]{0,63}", re.ASCII)  # it becomes part of a file's name
_CUTS = ("none", "first_unindented_line")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeRules:
    """How a completion becomes a program: Jinja templates over the item's columns and `completion`."""

    source: str
    tests: str
    cut: Literal["none", "first_unindented_line"]
    seconds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFile:
    """A JSONL file on this machine, or the rows [from, to) of it."""

    path: Path
    rows: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One checked task. `files` is split -> file; empty means that the data comes from `hub`.

    `config` is lm-eval's part as written; `gold` a Jinja template of what follows the prompt in a
    right answer; `sha256` covers the file's text and its data.
    """

    name: str
    domain: str
    config: Mapping[str, object]
    files: Mapping[str, LocalFile]
    hub: Mapping[str, str]
    code: CodeRules | None
    sha256: str
    gold: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the task runs without a network."""
        return bool(self.files)

    @property
    def filters(self) -> tuple[str, ...]:
        """The names of its filters; the first gives the score."""
        listed = self.config.get("filter_list")
        names = [str(entry.get("name")) for entry in listed] if isinstance(listed, list) else []
        return tuple(names) or ("none",)  # lm-eval's name for no filter


def get_task_name(name: str) -> str:
    """What reports call a task that is asked for by its name or by its file's path: no path of this
    machine.
    """
    return task_files.find_task_path(name).stem


def load_tasks(names: Sequence[str], data_folder: Path | None = None) -> tuple[Task, ...]:
    """Read and check tasks by name, or by path when the name ends in .yaml.

    Data is looked for in `data_folder` (default: $QUANTKIT_DATA), then in the folder `data` beside
    the task's file, then on the hub. EvaluationError lists every fault of every task.
    """
    found, faults = [], []
    for name in names:
        try:
            found.append(_load(name, data_folder))
        except EvaluationError as error:
            faults.append(str(error))
    if faults:
        raise EvaluationError("\n".join(faults))
    return tuple(found)


@contextmanager
def render_tasks(tasks: Sequence[Task]) -> Iterator[Path]:
    """A temporary folder with the tasks as lm-eval reads them (JSON is YAML), and a place for its
    data cache.
    """
    with task_files.make_temporary_folder() as place:
        for task in tasks:
            for split, file in task.files.items():
                if file.rows is not None:
                    task_files.write_text(
                        _selected(task, split, place),
                        task_files.read_row_range(file.path, *file.rows),
                    )
            task_files.write_text(
                place / f"{task.name}.yaml", json.dumps(_lm_eval_config(task, place))
            )
        yield place


def _selected(task: Task, split: str, place: Path) -> Path:
    """Where the selected rows of a split are put."""
    return place / f"{task.sha256[:16]}.{split}.jsonl"


def _lm_eval_config(task: Task, place: Path) -> dict[str, object]:
    if not task.is_local:
        data: dict[str, object] = {"dataset_path": task.hub["path"]}
        return {
            **task.config,
            **data,
            **({"dataset_name": task.hub["name"]} if "name" in task.hub else {}),
        }
    files = {
        split: str(file.path if file.rows is None else _selected(task, split, place))
        for split, file in task.files.items()
    }
    kwargs = {
        "data_files": files,
        "cache_dir": str(place / "cache"),
    }  # otherwise every run would add to ~/.cache
    return {**task.config, "dataset_path": "json", "dataset_kwargs": kwargs}


def _load(name: str, data_folder: Path | None) -> Task:
    path = task_files.find_task_path(name)
    if not is_file(path):
        known = task_files.list_task_names()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise EvaluationError(
            f"evaluation task {name!r}: no such task; {hint}known: {', '.join(known)}"
        )
    text = task_files.read_task_text(path)
    check = _Check(where=str(path), faults=[])
    config = _mapping_of(text, path)
    block = check.mapping(config.pop(_BLOCK, None), _BLOCK, _KEYS)
    places = _places(path, data_folder)
    files, missing = check.files(block.get("local"), places)
    hub = check.strings(block.get("hub"), f"{_BLOCK}.hub", ("path", "name"))
    if missing and "path" not in hub:
        looked = ", ".join(str(place) for place in places)
        check.faults.append(
            f"{path}: {_BLOCK}.local: {', '.join(missing)} not found in {looked}, and no hub dataset is named; set "
            f"{DATA_VARIABLE} to the folder that holds it"
        )
    elif not files and not missing and "path" not in hub:
        check.faults.append(
            f"{path}: {_BLOCK}: expected local files or a hub dataset, found neither; name one"
        )
    if config.get("task") != path.stem:
        check.faults.append(
            f"{path}: task: expected {path.stem!r} like the file, found {shorten_repr(config.get('task'))}"
        )
    if config.get("output_type") != "generate_until":
        check.faults.append(
            f"{path}: output_type: expected generate_until, found {shorten_repr(config.get('output_type'))}"
        )
    domain = check.text(block, "domain", _BLOCK)
    code = check.code(block.get("code"))
    gold = check.text(block, "gold", _BLOCK) if "gold" in block else None
    if check.faults:
        raise EvaluationError("\n".join(check.faults))
    files = {} if missing else files
    return Task(
        name=path.stem,
        domain=domain,
        config=config,
        files=files,
        hub=hub,
        code=code,
        gold=gold,
        sha256=_hash(text, files, hub),
    )


def _places(path: Path, data_folder: Path | None) -> tuple[Path, ...]:
    given = os.environ.get(DATA_VARIABLE)
    first = data_folder if data_folder is not None else Path(given) if given else None
    return (*((first,) if first is not None else ()), path.parent / "data")


def _mapping_of(text: str, path: Path) -> dict[str, object]:
    try:
        value = safe_yaml.load(text)
    except safe_yaml.UnreadableYaml as fault:
        line = f":{fault.line}" if fault.line else ""
        raise EvaluationError(
            f"{path}{line}: expected a YAML mapping, found {fault}; correct the file"
        ) from None
    if not isinstance(value, dict):
        raise EvaluationError(f"{path}: expected a YAML mapping, found {type(value).__name__}")
    return value


def _hash(text: str, files: Mapping[str, LocalFile], hub: Mapping[str, str]) -> str:
    data = {
        split: [sha256_file(file.path, EvaluationError), file.rows]
        for split, file in sorted(files.items())
    }
    whole = json.dumps([text, data or dict(hub)], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Check:
    """Reads the block's keys and collects what is wrong with them."""

    where: str
    faults: list[str]

    def mapping(self, value: object, key: str, known: Sequence[str]) -> dict[str, object]:
        """The mapping under `key`, without what is not known."""
        if not isinstance(value, dict):
            self.faults.append(
                f"{self.where}: {key}: expected a mapping with {', '.join(known)}, found {shorten_repr(value)}"
            )
            return {}
        for unknown in value.keys() - set(known):
            near = difflib.get_close_matches(str(unknown), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            self.faults.append(f"{self.where}: {key}.{unknown:.80}: no such key; {hint}")
        return {str(name): entry for name, entry in value.items() if name in known}

    def text(self, block: Mapping[str, object], name: str, key: str) -> str:
        """The string `name` of a mapping."""
        value = block.get(name)
        if not isinstance(value, str) or not value:
            self.faults.append(
                f"{self.where}: {key}.{name}: expected text, found {shorten_repr(value)}"
            )
            return ""
        return value

    def strings(self, value: object, key: str, known: Sequence[str]) -> dict[str, str]:
        """A mapping of strings; nothing is an empty one."""
        found = self.mapping(value, key, known) if value is not None else {}
        return {name: self.text(found, name, key) for name in found}

    def files(
        self, value: object, places: tuple[Path, ...]
    ) -> tuple[dict[str, LocalFile], list[str]]:
        """split -> the file that exists, and the names of those that do not."""
        key = f"{_BLOCK}.local"
        if value is None:
            return {}, []
        if not isinstance(value, dict):
            self.faults.append(
                f"{self.where}: {key}: expected split: file, found {shorten_repr(value)}"
            )
            return {}, []
        files, missing = {}, []
        for split, entry in value.items():
            if not _SPLIT.fullmatch(str(split)):
                self.faults.append(
                    f"{self.where}: {key}: expected a split's name of at most 64 letters, digits and _, found "
                    f"{shorten_repr(split)}; rename it"
                )
                continue
            whole = {"file": entry} if isinstance(entry, str) else entry
            parts = self.mapping(whole, f"{key}.{split}", ("file", "rows"))
            name = self.text(parts, "file", f"{key}.{split}")
            found = task_files.find_first_file(name, places) if name else None
            if found is None:
                missing += [name] if name else []
            else:
                files[str(split)] = LocalFile(
                    path=found, rows=self.rows(parts.get("rows"), f"{key}.{split}")
                )
        return files, missing

    def rows(self, value: object, key: str) -> tuple[int, int] | None:
        """[from, to] with from < to."""
        if value is None:
            return None
        if isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value):
            start, end = value
            if 0 <= start < end:
                return start, end
        self.faults.append(
            f"{self.where}: {key}.rows: expected [from, to] with 0 <= from < to, found {shorten_repr(value)}"
        )
        return None

    def code(self, value: object) -> CodeRules | None:
        """The rules of a code task; None when the task has none."""
        if value is None:
            return None
        key = f"{_BLOCK}.code"
        found = self.mapping(value, key, _CODE_KEYS)
        source, tests = self.text(found, "source", key), self.text(found, "tests", key)
        cut, seconds = found.get("cut", "none"), found.get("seconds", 10)
        if cut not in _CUTS:
            self.faults.append(
                f"{self.where}: {key}.cut: expected one of {', '.join(_CUTS)}, found {shorten_repr(cut)}"
            )
        if type(seconds) is not int or not 1 <= seconds <= 600:
            found_seconds = shorten_repr(seconds)
            self.faults.append(
                f"{self.where}: {key}.seconds: expected a whole number from 1 to 600, found {found_seconds}"
            )
            seconds = 10
        unindented = cut == "first_unindented_line"
        return CodeRules(
            source=source,
            tests=tests,
            cut="first_unindented_line" if unindented else "none",
            seconds=seconds,
        )
