"""Benchmark tasks of evals/: lm-eval tasks with a block `quantkit:` for data and code rules.

`load_tasks` reads and checks task files; `render_tasks` writes them for lm-eval, with the paths of
the data in place of the block.
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
from typing import Annotated, Literal

from jinja2 import Environment, StrictUndefined
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from quantkit.errors import EvaluationError, RecipeError
from quantkit.io import yaml_document
from quantkit.io.files import is_file, sha256_file, shorten_repr
from quantkit.io.validation_errors import describe_fault
from quantkit.io.yaml_document import KeyPath, YamlDocument, format_path
from quantkit.texts import task_files

DATA_VARIABLE = "QUANTKIT_DATA"
TEMPLATES = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
"""Renders templates as lm-eval does: they are code, not HTML."""

KIND = "task"
_BLOCK = "quantkit"
_SPLIT = re.compile(r"\w[\w.]{0,63}", re.ASCII)  # it becomes part of a file's name
_DICT_KEY = "[key]"  # how pydantic names the key of a mapping in a location
_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True)


def _check_split(name: str) -> str:
    if not _SPLIT.fullmatch(name):
        raise ValueError(
            "expected a split's name of at most 64 letters, digits and _, found "
            f"{shorten_repr(name)}; rename it"
        )
    return name


def _check_rows(value: object) -> object:
    if isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value):
        start, end = value
        if 0 <= start < end:
            return start, end
    raise ValueError(f"expected [from, to] with 0 <= from < to, found {shorten_repr(value)}")


def _wrap_file_name(value: object) -> object:
    return {"file": value} if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1)]
Rows = Annotated[tuple[int, int], BeforeValidator(_check_rows)]
SplitName = Annotated[str, AfterValidator(_check_split)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFolders:
    """Folders with local data, and whether a hub dataset can replace missing files."""

    folders: tuple[Path, ...]
    has_hub: bool


class SplitFile(BaseModel):
    """The key `quantkit.local.SPLIT`: a JSONL file, or the rows [from, to) of it."""

    model_config = _FROZEN
    file: Text
    rows: Rows | None = None

    @field_validator("file")
    @classmethod
    def _check_file(cls, name: str, info: ValidationInfo) -> str:
        data = info.context
        assert isinstance(data, DataFolders)
        if not data.has_hub and task_files.find_first_file(name, data.folders) is None:
            raise ValueError(
                f"{name} not found in {', '.join(map(str, data.folders))}, and no hub dataset is "
                "named; set "
                f"{DATA_VARIABLE} to the folder that holds it"
            )
        return name


class TaskDataset(BaseModel):
    """The key `quantkit.hub`: a dataset on the hub, used if a local file is missing."""

    model_config = _FROZEN
    path: Text
    name: Text | None = None


class CodeRules(BaseModel):
    """The key `quantkit.code`: program templates over the item's columns and `completion`."""

    model_config = _FROZEN
    source: Text
    tests: Text
    cut: Literal["none", "first_unindented_line"] = "none"
    seconds: Annotated[int, Field(ge=1, le=600)] = 10


class QuantkitBlock(BaseModel):
    """The key `quantkit` of a task file."""

    model_config = _FROZEN
    domain: Text
    hub: TaskDataset | None = None
    local: dict[SplitName, Annotated[SplitFile, BeforeValidator(_wrap_file_name)]] | None = Field(
        default=None, validate_default=True
    )
    gold: Text | None = None
    code: CodeRules | None = None

    @field_validator("local")
    @classmethod
    def _check_local(
        cls, local: dict[str, SplitFile] | None, info: ValidationInfo
    ) -> dict[str, SplitFile] | None:
        assert isinstance(info.context, DataFolders)
        if not local and not info.context.has_hub:
            raise ValueError(
                "expected local files or a hub dataset, found neither; add `local` or `hub`"
            )
        return local


class TaskFile(BaseModel):
    """A task file: the keys that quantkit reads; the others are lm-eval's."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    quantkit: QuantkitBlock
    task: str
    output_type: Literal["generate_until"]


_SECTIONS: Mapping[str, type[BaseModel]] = {"hub": TaskDataset, "code": CodeRules}


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFile:
    """A JSONL file on this machine, or the rows [from, to) of it."""

    path: Path
    rows: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One checked task. `files` is split -> file; empty means that the data comes from `hub`.

    `config` is lm-eval's part of the file; `gold` a Jinja template of the solution that follows the
    prompt; `sha256` covers the file's text and its data.
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
        entries = self.config.get("filter_list")
        names = [str(entry.get("name")) for entry in entries] if isinstance(entries, list) else []
        return tuple(names) or ("none",)  # lm-eval's name for no filter


def get_task_name(name: str) -> str:
    """Return a task's name in reports, which have no paths of this machine."""
    return task_files.find_task_path(name).stem


def load_tasks(names: Sequence[str], data_folder: Path | None = None) -> tuple[Task, ...]:
    """Read and check tasks by name, or by path if the name ends in .yaml.

    Data is searched in `data_folder` (default: $QUANTKIT_DATA), then in the folder `data` next to
    the task's file, then on the hub. Raises EvaluationError with every fault of every task.
    """
    loaded, faults = [], []
    for name in names:
        try:
            loaded.append(_load_task(name, data_folder))
        except EvaluationError as error:
            faults.append(str(error))
    if faults:
        raise EvaluationError("\n".join(faults))
    return tuple(loaded)


@contextmanager
def render_tasks(tasks: Sequence[Task]) -> Iterator[Path]:
    """Yield a temporary folder with the tasks as lm-eval reads them (JSON is YAML)."""
    with task_files.make_temporary_folder() as folder:
        for task in tasks:
            for split, file in task.files.items():
                if file.rows is not None:
                    text = task_files.read_row_range(file.path, *file.rows)
                    task_files.save_text(_get_rows_path(task, split, folder), text)
            config = json.dumps(_make_lm_eval_config(task, folder))
            task_files.save_text(folder / f"{task.name}.yaml", config)
        yield folder


def _get_rows_path(task: Task, split: str, folder: Path) -> Path:
    """Return the file for the selected rows of a split."""
    return folder / f"{task.sha256[:16]}.{split}.jsonl"


def _make_lm_eval_config(task: Task, folder: Path) -> dict[str, object]:
    if not task.is_local:
        dataset: dict[str, object] = {"dataset_path": task.hub["path"]}
        if "name" in task.hub:
            dataset["dataset_name"] = task.hub["name"]
        return {**task.config, **dataset}
    files = {
        split: str(file.path if file.rows is None else _get_rows_path(task, split, folder))
        for split, file in task.files.items()
    }
    # without a cache folder of its own every run would add to ~/.cache
    kwargs = {"data_files": files, "cache_dir": str(folder / "cache")}
    return {**task.config, "dataset_path": "json", "dataset_kwargs": kwargs}


def _load_task(name: str, data_folder: Path | None) -> Task:
    path = task_files.find_task_path(name)
    if not is_file(path):
        known = task_files.list_task_names()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise EvaluationError(
            f"evaluation task {name!r}: no such task; {hint}known: {', '.join(known)}"
        )
    text = task_files.read_task_text(path)
    document = _parse_document(text, path)
    folders = _list_data_folders(path, data_folder)
    values = _validate(document, path, folders)
    block = values.quantkit
    files = _find_files(block.local or {}, folders)
    hub = block.hub.model_dump(exclude_none=True) if block.hub else {}
    return Task(
        name=path.stem,
        domain=block.domain,
        config={key: value for key, value in document.values.items() if key != _BLOCK},
        files=files,
        hub=hub,
        code=block.code,
        gold=block.gold,
        sha256=_hash_task(text, files, hub),
    )


def _list_data_folders(path: Path, data_folder: Path | None) -> tuple[Path, ...]:
    variable = os.environ.get(DATA_VARIABLE)
    folder = data_folder if data_folder is not None else Path(variable) if variable else None
    own = path.parent / "data"
    return (own,) if folder is None else (folder, own)


def _parse_document(text: str, path: Path) -> YamlDocument:
    try:
        document = yaml_document.parse_document(text, str(path), KIND, "task: NAME")
        json.dumps(document.values, allow_nan=False)
    except RecipeError as error:
        raise EvaluationError(str(error)) from None
    except ValueError as error:
        raise EvaluationError(
            f"{path}: expected finite numbers, found: {error}; correct the file"
        ) from None
    for key in document.values:
        if not key.isidentifier():  # lm-eval takes the other keys as names of fields
            raise EvaluationError(
                f"{document.where((key,))}: expected a key of lm-eval's tasks, found {key[:40]!r}; "
                "remove it"
            )
    return document


def _validate(document: YamlDocument, path: Path, folders: tuple[Path, ...]) -> TaskFile:
    """Validate a task file.

    Raises EvaluationError with every fault, in the order of their lines.
    """
    block = document.values.get(_BLOCK)
    hub = block.get("hub") if isinstance(block, dict) else None
    has_hub = isinstance(hub, dict) and "path" in hub
    faults: list[tuple[int, str]] = []
    try:
        values = TaskFile.model_validate(
            document.values, context=DataFolders(folders=folders, has_hub=has_hub)
        )
    except ValidationError as error:
        for details in error.errors(include_url=False):
            key: KeyPath = tuple(details["loc"])
            known = _list_known_keys(key)
            key = key[:-2] if key[-1] == _DICT_KEY else key
            sentence = describe_fault(key, details, known)
            where = document.where(key)
            faults.append((document.line(key), f"{where}: {format_path(key)}: {sentence}"))
    name = document.values.get("task")
    if isinstance(name, str) and name != path.stem:
        sentence = (
            f"expected {path.stem!r} like the file, found {shorten_repr(name)}; rename one of them"
        )
        faults.append((document.line(("task",)), f"{document.where(('task',))}: task: {sentence}"))
    if faults:
        raise EvaluationError("\n".join(text for _, text in sorted(faults)))
    return values


def _list_known_keys(key: KeyPath) -> tuple[str, ...]:
    """Return the keys allowed in the mapping that holds `key`."""
    if len(key) < 2:
        return tuple(TaskFile.model_fields)
    if len(key) == 2:
        return tuple(QuantkitBlock.model_fields)
    return tuple(_SECTIONS.get(str(key[1]), SplitFile).model_fields)


def _find_files(local: Mapping[str, SplitFile], folders: tuple[Path, ...]) -> dict[str, LocalFile]:
    """Return split -> file; empty unless every file exists."""
    files = {}
    for split, entry in local.items():
        path = task_files.find_first_file(entry.file, folders)
        if path is None:
            return {}
        files[split] = LocalFile(path=path, rows=entry.rows)
    return files


def _hash_task(text: str, files: Mapping[str, LocalFile], hub: Mapping[str, str]) -> str:
    data = {
        split: [sha256_file(file.path, EvaluationError), file.rows]
        for split, file in sorted(files.items())
    }
    content = json.dumps([text, data or dict(hub)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
