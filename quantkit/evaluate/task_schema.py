"""The keys of a task file, as pydantic models.

A task file is a stranger's. Its keys are those that quantkit passes to lm-eval and knows to run no
code; metrics and filters are named ones. Everything else is refused with what to use instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from quantkit.evaluate.chat_answers import ChatAnswer
from quantkit.io.files import shorten_repr
from quantkit.io.yaml_document import KeyPath
from quantkit.texts import task_files
from quantkit.texts.data_names import check_dataset_name, check_inner_path

DATA_VARIABLE = "QUANTKIT_DATA"
MAX_EXAMPLES = 1000
"""Worked examples of a prompt; more fit into no context."""
MAX_REPEATS = 1000
"""Answers per item."""

_STEP_SETTINGS: Mapping[str, frozenset[str]] = {
    "regex": frozenset({"regex_pattern", "group_select", "fallback"}),
    "take_first_k": frozenset({"k"}),
    "map": frozenset({"mapping_dict", "default_value"}),
}
"""Filter -> its settings; the others have none."""
_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True)

REFUSED_KEYS: Mapping[str, str] = {
    "include": "copy the keys of that file into this one",
    "group": "list the tasks in --tasks or evaluation.tasks",
    "task_list": "list the tasks in --tasks or evaluation.tasks",
    "class": "write the task with templates, or with quantkit.python",
    "dataset_name": "use quantkit.hub.name",
    "dataset_kwargs": "name the data with quantkit.local or quantkit.hub",
    "custom_dataset": "name the data with quantkit.local or quantkit.hub",
    "process_docs": "prepare the data file, or define process_docs in the file of quantkit.python",
    "process_results": "use filter_list with exact_match, or define process_results in the file of "
    "quantkit.python",
    "doc_to_choice": "write the answer's text in doc_to_target, e.g. '{{choices[answer]}}'",
    "doc_to_image": "quantkit evaluates text",
    "doc_to_audio": "quantkit evaluates text",
    "unsafe_code": "use quantkit.code: programs run in a sandbox",
    "use_prompt": "copy the prompt into doc_to_text",
    "should_decontaminate": "quantkit does not decontaminate; remove the key",
    "doc_to_decontamination_query": "quantkit does not decontaminate; remove the key",
    "hf_evaluate": "metrics that download code are not run; use exact_match, or define "
    "process_results in the file of quantkit.python",
}
"""Keys of lm-eval's tasks that are refused -> what to use instead."""


def _check_split(name: str) -> str:
    if not task_files.SPLIT_NAME.fullmatch(name):
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


TaskForm = Literal["plain", "chat"]
"""How prompts are asked: as text to continue, or as a conversation."""

Text = Annotated[str, Field(min_length=1)]
Rows = Annotated[tuple[int, int], BeforeValidator(_check_rows)]
SplitName = Annotated[str, AfterValidator(_check_split)]
InnerPath = Annotated[Text, AfterValidator(check_inner_path)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFolders:
    """Folders with local data, and whether a hub dataset can replace missing files."""

    folders: tuple[Path, ...]
    has_hub: bool


class SplitFile(BaseModel):
    """The key `quantkit.local.SPLIT`: a JSONL file, or the rows [from, to) of it."""

    model_config = _FROZEN
    file: InnerPath
    rows: Rows | None = None

    @field_validator("file")
    @classmethod
    def _check_file(cls, name: str, info: ValidationInfo) -> str:
        data = info.context
        assert isinstance(data, DataFolders)
        if not data.has_hub and task_files.find_first_file(name, data.folders) is None:
            raise ValueError(
                f"{name} not found in {', '.join(map(str, data.folders))}, and no hub dataset is "
                f"named; set {DATA_VARIABLE} to the folder that holds it"
            )
        return name


class TaskDataset(BaseModel):
    """The key `quantkit.hub`: a dataset on the hub, used if a local file is missing."""

    model_config = _FROZEN
    path: Annotated[Text, AfterValidator(check_dataset_name)]
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
    python: InnerPath | None = None
    chat: ChatAnswer | None = None
    validated: Annotated[tuple[TaskForm, ...], Field(strict=False, min_length=1)] = ("plain",)

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


class GenerationSettings(BaseModel):
    """The key `generation_kwargs`: how a model writes its answer."""

    model_config = _FROZEN
    until: str | list[str] = Field(default_factory=list)
    max_gen_toks: int | None = None
    do_sample: bool = False
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    seed: int | None = None


class FilterStep(BaseModel):
    """One step of a filter: a function of lm-eval and its settings."""

    model_config = _FROZEN
    function: Literal[
        "regex", "take_first", "take_first_k", "majority_vote", "lowercase", "uppercase",
        "remove_whitespace", "map",
    ]  # fmt: skip
    regex_pattern: str | None = None
    group_select: int | None = None
    fallback: str | None = None
    k: int | None = Field(default=None, ge=1, le=MAX_REPEATS)
    mapping_dict: dict[str, str] | None = None
    default_value: str | None = None

    @model_validator(mode="after")
    def _check_settings(self) -> FilterStep:
        known = _STEP_SETTINGS.get(self.function, frozenset())
        extra = sorted(self.model_fields_set - known - {"function"})
        if extra:
            raise ValueError(f"{self.function} has no setting {', '.join(extra)}; remove it")
        if self.function == "take_first_k" and self.k is None:
            raise ValueError("take_first_k needs the setting k; add it")
        return self


class FilterPipeline(BaseModel):
    """One entry of `filter_list`: a name, and the steps that extract the answer."""

    model_config = _FROZEN
    name: Text
    filter: list[FilterStep] = Field(min_length=1)


class MetricEntry(BaseModel):
    """One entry of `metric_list`. bypass: the sandbox scores."""

    model_config = _FROZEN
    metric: Literal["exact_match", "bypass"]
    aggregation: Literal["mean", "median", "bypass"] | None = None
    higher_is_better: bool = True
    ignore_case: bool | None = None
    ignore_punctuation: bool | None = None
    ignore_numbers: bool | None = None
    regexes_to_ignore: list[str] | None = None


class FewshotSettings(BaseModel):
    """The key `fewshot_config`: which worked examples a prompt has, and how they are written."""

    model_config = _FROZEN
    sampler: Literal["default", "first_n"] = "default"
    split: SplitName | None = None
    samples: Annotated[list[dict[str, object]], Field(max_length=MAX_EXAMPLES)] | None = None
    doc_to_text: Text | None = None
    doc_to_target: Text | None = None
    target_delimiter: str | None = None
    fewshot_delimiter: str | None = None
    gen_prefix: str | None = None


class TaskFile(BaseModel):
    """A task file: quantkit's block, and the keys of lm-eval that run no code."""

    model_config = _FROZEN
    quantkit: QuantkitBlock
    task: str
    output_type: Literal["generate_until"]
    doc_to_text: Text | None = None
    doc_to_target: Text | None = None
    test_split: SplitName | None = None
    validation_split: SplitName | None = None
    training_split: SplitName | None = None
    fewshot_split: SplitName | None = None
    num_fewshot: Annotated[int, Field(ge=0, le=MAX_EXAMPLES)] | None = None
    fewshot_config: FewshotSettings | None = None
    description: str | None = None
    target_delimiter: str | None = None
    fewshot_delimiter: str | None = None
    gen_prefix: str | None = None
    generation_kwargs: GenerationSettings | None = None
    repeats: Annotated[int, Field(ge=1, le=MAX_REPEATS)] | None = None
    filter_list: Annotated[list[FilterPipeline], Field(min_length=1)] | None = None
    metric_list: Annotated[list[MetricEntry], Field(min_length=1)] | None = None
    metadata: dict[str, object] | None = None
    task_alias: str | None = None  # a name for people; not used
    tag: str | list[str] | None = None  # the same
    dataset_path: str | None = None  # replaced by the data of the block

    @field_validator("filter_list")
    @classmethod
    def _check_filters(
        cls, pipelines: list[FilterPipeline] | None, info: ValidationInfo
    ) -> list[FilterPipeline] | None:
        repeats = info.data.get("repeats") or 1
        most = max((step.k or 0 for entry in pipelines or () for step in entry.filter), default=0)
        if most > repeats:
            raise ValueError(
                f"take_first_k: k: expected at most repeats, {repeats}, found {most}; lower it or "
                "raise repeats"
            )
        return pipelines


_SECTIONS: Mapping[tuple[str, ...], type[BaseModel]] = {
    (): TaskFile,
    ("quantkit",): QuantkitBlock,
    ("quantkit", "hub"): TaskDataset,
    ("quantkit", "code"): CodeRules,
    ("quantkit", "local", "*"): SplitFile,
    ("generation_kwargs",): GenerationSettings,
    ("fewshot_config",): FewshotSettings,
    ("filter_list", "*"): FilterPipeline,
    ("filter_list", "*", "filter", "*"): FilterStep,
    ("metric_list", "*"): MetricEntry,
}
"""Where each model stands in a file; * is a position of a list or a name of a split."""


def list_known_keys(key: KeyPath) -> tuple[str, ...]:
    """Return the keys allowed in the mapping that holds `key`."""
    parent = tuple(
        "*" if isinstance(part, int) or key[:index] == ("quantkit", "local") else part
        for index, part in enumerate(key[:-1])
    )
    model = _SECTIONS.get(parent, TaskFile)
    return tuple(model.model_fields)
