"""Tasks of task files as lm-eval objects, without a stranger's text in lm-eval's hands.

lm-eval renders templates with an environment that reaches every Python object, and applies patterns
without a limit. It gets functions instead: they render one document, or apply one pattern, in a
process with limits (io/templates.py). The task's own Python runs only if the user trusts its hash.

Imported only when a benchmark runs: lm-eval takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.metrics import exact_match_fn
from lm_eval.api.task import ConfigurableTask

from quantkit.errors import EvaluationError
from quantkit.evaluate.tasks import (
    Task,
    get_lm_eval_keys,
    make_template_error,
    render_field,
    render_target,
)
from quantkit.io.templates import TemplateFault, TemplateWorker

Row = Mapping[str, object]
PYTHON_FUNCTIONS = ("process_docs", "doc_to_text", "doc_to_target", "process_results")
"""Functions of a task's own Python that take the place of lm-eval's keys of these names."""

_DEFAULT_PATTERN = r"#### (\-?[0-9\.\,]+)"  # lm-eval's own


class BoundedTask(ConfigurableTask):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's task whose description and prefix are functions of the document, too."""

    def resolve_field(self, doc: Row, field: Callable[[Row], object] | None = None) -> object:
        """Return a text of a document: the description, or an example's prefix."""
        return field(doc) if field else None

    def doc_to_prefix(self, doc: Row) -> object:
        """Return the start of the answer, or None."""
        return self.resolve_field(doc, self.config.gen_prefix)


@dataclass(frozen=True, slots=True)
class BoundedRegexFilter:
    """lm-eval's filter `regex`, applied in the process with limits."""

    worker: TemplateWorker
    where: str
    pattern: str
    group: int
    fallback: str

    def apply(self, resps: Iterable[Sequence[object]], _docs: object) -> list[list[str]]:
        """Return the match, or the fallback, of every answer of every item."""
        return [
            self._find_matches([text if isinstance(text, str) else "" for text in answers])
            for answers in resps
        ]

    def _find_matches(self, texts: Sequence[str]) -> list[str]:
        try:
            return self.worker.find_matches(
                self.pattern, texts, group=self.group, fallback=self.fallback
            )
        except TemplateFault as fault:
            raise make_template_error(self.where, fault) from None


def make_lm_eval_task(
    task: Task, data_keys: Mapping[str, object], worker: TemplateWorker
) -> BoundedTask:
    """Make lm-eval's object for a task. It reads the data and renders the first document.

    data_keys: see tasks.open_task_data. Raises UnsuitedError if a template gives no text,
    EvaluationError if the task's own Python fails, and errors of lm-eval and datasets.
    """
    config = get_lm_eval_keys(task) | dict(data_keys)
    fewshot = config.get("fewshot_config")
    if isinstance(fewshot, dict):
        config["fewshot_config"] = _replace_templates(task.name, "fewshot_config.", fewshot, worker)
    config = _replace_templates(task.name, "", config, worker)
    if isinstance(filters := config.get("filter_list"), list):
        config["filter_list"] = [_bound_filter(task.name, entry, worker) for entry in filters]
    if isinstance(metrics := config.get("metric_list"), list):
        config["metric_list"] = [_bound_metric(task.name, entry, worker) for entry in metrics]
    return BoundedTask(config=config | _load_functions(task))


def _replace_templates(
    task: str, prefix: str, config: Mapping[str, object], worker: TemplateWorker
) -> dict[str, object]:
    """Return a config with functions of a document in place of its templates."""
    replaced = dict(config)
    for key, render in (
        ("doc_to_text", render_field),
        ("doc_to_target", render_target),
        ("description", render_field),
        ("gen_prefix", render_field),
    ):
        template = config.get(key)
        if isinstance(template, str):
            replaced[key] = _make_function(worker, f"{task}: {prefix}{key}", template, render)
    return replaced


def _make_function(
    worker: TemplateWorker,
    where: str,
    template: str,
    render: Callable[[TemplateWorker, str, str, Row], object],
) -> Callable[[Row], object]:
    """Return a function of a document. A plain function: lm-eval copies its config deeply."""

    def render_document(doc: Row) -> object:
        return render(worker, where, template, doc)

    return render_document


def _bound_filter(task: str, entry: Mapping[str, Any], worker: TemplateWorker) -> dict[str, object]:
    """Return a filter whose regular expressions have limits."""
    where = f"{task}: filter_list: {entry['name']}"

    def make_regex_filter(
        regex_pattern: str = _DEFAULT_PATTERN, group_select: int = 0, fallback: str = "[invalid]"
    ) -> BoundedRegexFilter:
        return BoundedRegexFilter(worker, where, regex_pattern, group_select, fallback)

    steps = [
        {**step, "function": make_regex_filter} if step["function"] == "regex" else step
        for step in entry["filter"]
    ]
    return {**entry, "filter": steps}


def _bound_metric(
    task: str, entry: Mapping[str, object], worker: TemplateWorker
) -> Mapping[str, object]:
    """Return a metric whose `regexes_to_ignore` have limits."""
    if not entry.get("regexes_to_ignore"):
        return entry
    where = f"{task}: metric_list: regexes_to_ignore"

    def exact_match(
        predictions: Sequence[str],
        references: Sequence[str],
        regexes_to_ignore: Sequence[str],
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        ignore_numbers: bool = False,
    ) -> object:
        try:
            actual, expected = (
                worker.remove_matches(regexes_to_ignore, [str(text) for text in texts])
                for texts in (predictions, references)
            )
        except TemplateFault as fault:
            raise make_template_error(where, fault) from None
        return exact_match_fn(
            predictions=actual,
            references=expected,
            ignore_case=ignore_case,
            ignore_punctuation=ignore_punctuation,
            ignore_numbers=ignore_numbers,
        )

    return {**entry, "metric": exact_match}


def _load_functions(task: Task) -> dict[str, object]:
    """Run the task's own Python and return its functions by lm-eval's keys."""
    if task.python is None:
        return {}
    path, names = str(task.python.path), dict[str, object]()
    names["__name__"] = names["__file__"] = path
    try:
        # the text that was hashed, not the file, which may have changed since
        exec(compile(task.python.text, path, "exec"), names)  # noqa: S102
    except Exception as error:  # any error of any code
        raise EvaluationError(
            f"{path}: expected Python that runs, found {type(error).__name__}: {error}; correct it"
        ) from error
    functions = {name: names[name] for name in PYTHON_FUNCTIONS if callable(names.get(name))}
    if not functions:
        raise EvaluationError(
            f"{path}: expected a function {', '.join(PYTHON_FUNCTIONS)}, found none; define one"
        )
    return functions
