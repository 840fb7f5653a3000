"""Benchmark tasks of evals/: lm-eval tasks with a block `quantkit:` for data and code rules.

`load_tasks` reads and checks task files (task_schema.py); `open_task_data` says where lm-eval finds
their rows. Templates of a task are rendered by `render_field` and its like, never by lm-eval.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from quantkit.errors import EvaluationError, RecipeError, UnsuitedError, UntrustedCode
from quantkit.evaluate.chat_answers import ChatAnswer
from quantkit.evaluate.task_schema import (
    DATA_VARIABLE,
    REFUSED_KEYS,
    CodeRules,
    DataFolders,
    SplitFile,
    TaskFile,
    TaskForm,
    list_known_keys,
)
from quantkit.io import yaml_document
from quantkit.io.files import is_file, sha256_file, shorten_repr
from quantkit.io.templates import TemplateFault, TemplateWorker
from quantkit.io.validation_errors import describe_fault
from quantkit.io.yaml_document import KeyPath, YamlDocument, format_path
from quantkit.texts import task_files
from quantkit.texts.task_files import PythonFile

KIND = "task"
MAX_SHOWN_FAULTS = 20  # of one file: a hostile one has thousands
_BLOCK = "quantkit"
_UNUSED_KEYS = frozenset({_BLOCK, "task_alias", "tag", "dataset_path"})
_DICT_KEY = "[key]"  # how pydantic names the key of a mapping in a location


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFile:
    """A JSONL file on this machine, or the rows [from, to) of it."""

    path: Path
    rows: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One checked task. `files` is split -> file; empty means that the data comes from `hub`.

    `config` is lm-eval's part of the file; `gold` a Jinja template of the solution that follows the
    prompt; `python` the task's own code, which the user trusts; `chat`: how answers of a
    conversation are read; `validated`: the forms in which the task was compared with published
    scores; `sha256` covers the file's text, its data and its code.
    """

    name: str
    domain: str
    config: Mapping[str, object]
    files: Mapping[str, LocalFile]
    hub: Mapping[str, str]
    code: CodeRules | None
    sha256: str
    gold: str | None = None
    python: PythonFile | None = None
    chat: ChatAnswer = "text"
    validated: tuple[TaskForm, ...] = ("plain",)

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


def load_tasks(
    names: Sequence[str], data_folder: Path | None = None, *, trusted: Sequence[str] = ()
) -> tuple[Task, ...]:
    """Read and check tasks by name, or by path if the name ends in .yaml. Runs no code of theirs.

    Data is searched in `data_folder` (default: $QUANTKIT_DATA), then in the folder `data` next to
    the task's file, then on the hub. trusted: sha256 of Python files that tasks may run. Raises
    EvaluationError with every fault of every task.
    """
    loaded, faults = [], []
    for name in names:
        try:
            loaded.append(_load_task(name, data_folder, trusted))
        except EvaluationError as error:
            faults.append(str(error))
    if faults:
        raise EvaluationError("\n".join(faults))
    return tuple(loaded)


def check_trust(names: Sequence[str], trusted: Sequence[str]) -> None:
    """Raise UntrustedCode if a task has Python of its own that the user does not trust.

    Any other fault of a task is left to `load_tasks`: it does not stop a build.
    """
    for name in names:
        if name.endswith(task_files.SUFFIX):  # the shipped tasks have none
            try:
                _load_task(name, None, trusted)
            except UntrustedCode:
                raise
            except EvaluationError:
                continue


def render_field(
    worker: TemplateWorker, where: str, template: str, row: Mapping[str, object]
) -> object:
    """Return a column if the template is its name, else the rendered text, as lm-eval does.

    where: task and key, for the message. Raises UnsuitedError if the template gives no text.
    """
    if template in row:
        return row[template]
    try:
        return worker.render(template, row)
    except TemplateFault as fault:
        raise make_template_error(where, fault) from None


def render_target(
    worker: TemplateWorker, where: str, template: str, row: Mapping[str, object]
) -> object:
    """As `render_field`; a text that writes a list in Python becomes the list: several targets."""
    if template in row:
        return row[template]
    try:
        return worker.render_target(template, row)
    except TemplateFault as fault:
        raise make_template_error(where, fault) from None


def make_template_error(where: str, fault: TemplateFault) -> UnsuitedError:
    """Return the error for a template or pattern of a task that gives no text."""
    advice = "simplify it" if fault.is_limit else "use the names of the data's columns"
    return UnsuitedError(f"{where}: {fault}; {advice}")


@contextmanager
def open_task_data(tasks: Sequence[Task]) -> Iterator[dict[str, dict[str, object]]]:
    """Yield task -> the keys of lm-eval's config that name its data; selected rows are copied."""
    with task_files.make_temporary_folder() as folder:
        for task in tasks:
            for split, file in task.files.items():
                if file.rows is not None:
                    text = task_files.read_row_range(file.path, *file.rows)
                    task_files.save_text(_get_rows_path(task, split, folder), text)
        yield {task.name: _make_data_keys(task, folder) for task in tasks}


def get_lm_eval_keys(task: Task) -> dict[str, object]:
    """Return the keys of a task's config that lm-eval uses, as the file has them."""
    return {key: value for key, value in task.config.items() if key not in _UNUSED_KEYS}


def _get_rows_path(task: Task, split: str, folder: Path) -> Path:
    """Return the file for the selected rows of a split."""
    return folder / f"{task.sha256[:16]}.{split}.jsonl"


def _make_data_keys(task: Task, folder: Path) -> dict[str, object]:
    if not task.is_local:
        dataset: dict[str, object] = {"dataset_path": task.hub["path"]}
        if "name" in task.hub:
            dataset["dataset_name"] = task.hub["name"]
        return dataset
    files = {
        split: str(file.path if file.rows is None else _get_rows_path(task, split, folder))
        for split, file in task.files.items()
    }
    # without a cache folder of its own every run would add to ~/.cache
    kwargs = {"data_files": files, "cache_dir": str(folder / "cache")}
    return {"dataset_path": "json", "dataset_kwargs": kwargs}


def _load_task(name: str, data_folder: Path | None, trusted: Sequence[str]) -> Task:
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
    block = _validate(document, path, folders).quantkit
    files = _find_files(block.local or {}, folders)
    hub = block.hub.model_dump(exclude_none=True) if block.hub else {}
    python = None
    if block.python is not None:
        python = task_files.read_python(path.parent / block.python)
        _check_trust(python, document.where((_BLOCK, "python")), trusted)
    return Task(
        name=path.stem,
        domain=block.domain,
        config={key: value for key, value in document.values.items() if key != _BLOCK},
        files=files,
        hub=hub,
        code=block.code,
        gold=block.gold,
        python=python,
        chat=block.chat or ("text" if block.code is None else "code"),
        validated=block.validated,
        sha256=_hash_task(text, files, hub, python),
    )


def _check_trust(python: PythonFile, where: str, trusted: Sequence[str]) -> None:
    """Raise UntrustedCode unless the user trusts this very text."""
    if python.sha256 not in trusted:
        raise UntrustedCode(
            f"{where}: quantkit.python: {python.path} is code that would run on this machine with "
            f"your rights; read it, and if you trust it add --trust-task-code {python.sha256}"
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
    return document


def _validate(document: YamlDocument, path: Path, folders: tuple[Path, ...]) -> TaskFile:
    """Validate a task file.

    Raises EvaluationError with every fault, in the order of their lines.
    """
    block = document.values.get(_BLOCK)
    hub = block.get("hub") if isinstance(block, dict) else None
    has_hub = isinstance(hub, dict) and "path" in hub
    faults = _find_template_faults(document)
    try:
        values = TaskFile.model_validate(
            document.values, context=DataFolders(folders=folders, has_hub=has_hub)
        )
    except ValidationError as error:
        for details in error.errors(include_url=False):
            key: KeyPath = tuple(details["loc"])
            known = list_known_keys(key)
            key = key[:-2] if key[-1] == _DICT_KEY else key
            advice = (
                REFUSED_KEYS.get(str(key[-1])) if details["type"] == "extra_forbidden" else None
            )
            sentence = f"not supported; {advice}" if advice else describe_fault(key, details, known)
            where = document.where(key)
            faults.append((document.line(key), f"{where}: {format_path(key)}: {sentence}"))
    name = document.values.get("task")
    if isinstance(name, str) and name != path.stem:
        sentence = (
            f"expected {path.stem!r} like the file, found {shorten_repr(name)}; rename one of them"
        )
        faults.append((document.line(("task",)), f"{document.where(('task',))}: task: {sentence}"))
    if faults:
        raise EvaluationError("\n".join(_list_sentences(faults)))
    return values


def _list_sentences(faults: Sequence[tuple[int, str]]) -> list[str]:
    """Return the sentences of the first faults by line, and how many more there are."""
    sentences = [sentence for _, sentence in sorted(faults)]
    more = len(sentences) - MAX_SHOWN_FAULTS
    rest = [f"{more} more faults; correct these first"] if more > 0 else []
    return sentences[:MAX_SHOWN_FAULTS] + rest


def _find_template_faults(document: YamlDocument) -> list[tuple[int, str]]:
    """Return (line, sentence) for every template that a task needs and does not have."""
    block = document.values.get(_BLOCK)
    if isinstance(block, dict) and "python" in block:  # its functions can take the place of both
        return []
    return [
        (0, f"{document.name}: {key}: missing; this key has no default")
        for key in ("doc_to_text", "doc_to_target")
        if key not in document.values
    ]


def _find_files(local: Mapping[str, SplitFile], folders: tuple[Path, ...]) -> dict[str, LocalFile]:
    """Return split -> file; empty unless every file exists."""
    files = {}
    for split, entry in local.items():
        path = task_files.find_first_file(entry.file, folders)
        if path is None:
            return {}
        task_files.check_rows_file(path)
        files[split] = LocalFile(path=path, rows=entry.rows)
    return files


def _hash_task(
    text: str,
    files: Mapping[str, LocalFile],
    hub: Mapping[str, str],
    python: PythonFile | None,
) -> str:
    data = {
        split: [sha256_file(file.path, EvaluationError), file.rows]
        for split, file in sorted(files.items())
    }
    code = [python.sha256] if python is not None else []
    content = json.dumps([text, data or dict(hub), *code], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
