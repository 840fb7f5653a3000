"""Hostile task files: they run no code here, end within limits, and stop no other task."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.task import ConfigurableTask
from ruamel.yaml import YAML
from support.paths import ROOT
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantkit import pipeline
from quantkit.errors import EvaluationError, UnsuitedError, UntrustedCode
from quantkit.evaluate import lm_eval_tasks, solution_likelihood, task_runner, tasks
from quantkit.evaluate.bounded_task import make_lm_eval_task
from quantkit.evaluate.sandbox import Sandbox
from quantkit.evaluate.task_schema import DATA_VARIABLE
from quantkit.io import package_data, templates
from quantkit.io.templates import TemplateWorker
from quantkit.recipe.parse import parse_recipe
from quantkit.texts import task_files

NO_SANDBOX = Sandbox(kind="none", reason="a test said so")
GRAB = "{{ cycler.__init__.__globals__.os.system('touch OWNED') }}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ROWS = [{"question": f"{n} + {n} = ?", "answer": str(2 * n)} for n in range(1, 4)]
TASK: dict[str, Any] = {
    "task": "mine",
    "output_type": "generate_until",
    "test_split": "test",
    "num_fewshot": 0,
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
    "filter_list": [
        {
            "name": "answer",
            "filter": [
                {"function": "regex", "regex_pattern": "([0-9]+)"},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "quantkit": {"domain": "math", "local": {"test": "mine.jsonl"}, "gold": " {{answer}}"},
}
CODE = {"source": "{{completion}}", "tests": "assert True"}


def change(task: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """Return a copy of a task with the value at a dotted path replaced."""
    copy: dict[str, Any] = json.loads(json.dumps(task))
    *parents, last = path.split(".")
    place: Any = copy
    for part in parents:
        place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
    place[int(last) if last.isdigit() else last] = value
    return copy


def write_task(folder: Path, task: dict[str, Any], rows: list[dict[str, Any]] = ROWS) -> str:
    """Write a task and its rows; return the path of the file."""
    path = folder / f"{task['task']}.yaml"
    path.write_text(json.dumps(task))
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(package_data.locate_model("builtin:tiny-v3"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=768,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Work in an empty folder; lm-eval's own rendering of templates fails the test."""

    def refuse(template: str, doc: object) -> str:
        raise AssertionError(f"lm-eval was given a template: {template}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm_eval.utils.apply_template", refuse)
    monkeypatch.setattr(templates, "RENDER_SECONDS", 1)
    return tmp_path


def run(model, tokenizer, name: str) -> list[Any]:
    return task_runner.run_tasks(model, tokenizer, tasks.load_tasks([name]), jail=NO_SANDBOX)


def test_harmless_task_runs_without_lm_evals_templates(model, tokenizer, place):
    task = change(TASK, "description", "Compute {{question}}.\n\n")
    task = change(task, "gen_prefix", "It is")
    task = change(task, "num_fewshot", 1)
    samples = [{"question": "0?", "answer": "zero"}]
    task = change(task, "fewshot_config", {"sampler": "first_n", "samples": samples})
    task = change(task, "metric_list.0.regexes_to_ignore", [","])
    items = run(model, tokenizer, write_task(place, task))
    assert [item.target for item in items] == ["2", "4", "6"]
    assert items[0].prompt == (
        "Compute 1 + 1 = ?.\n\nQuestion: 0?\nAnswer: It is zero\n\nQuestion: 1 + 1 = ?\nAnswer: "
        "It is"
    )


@pytest.mark.parametrize(
    "path",
    [
        "doc_to_text",
        "doc_to_target",
        "description",
        "gen_prefix",
        "fewshot_config.doc_to_text",
        "fewshot_config.doc_to_target",
        "fewshot_config.gen_prefix",
    ],
)
@pytest.mark.parametrize(
    ("template", "sentence"),
    [(GRAB, "'__init__' of 'type' object is unsafe"), (LOOP, "of processor time, found more")],
    ids=["code", "loop"],
)
def test_template_runs_no_code_and_ends(model, tokenizer, place, path, template, sentence):
    task = change(TASK, "num_fewshot", 1)
    task = change(task, "fewshot_config", {"sampler": "first_n", "samples": ROWS})
    with pytest.raises(EvaluationError, match=sentence) as caught:
        run(model, tokenizer, write_task(place, change(task, path, template)))
    assert str(caught.value).startswith(f"mine: {path}: ")
    assert str(caught.value).isprintable()
    assert not (place / "OWNED").exists()


@pytest.mark.parametrize("key", ["source", "tests"])
def test_program_template_runs_no_code(model, tokenizer, place, key):
    task = change(TASK, "quantkit.code", CODE | {key: GRAB})
    with pytest.raises(UnsuitedError, match=r"mine: quantkit\.code: .* is unsafe"):
        run(model, tokenizer, write_task(place, task))
    assert not (place / "OWNED").exists()


@pytest.mark.parametrize("path", ["quantkit.gold", "doc_to_text", "doc_to_target"])
def test_likelihood_runs_no_code(tokenizer, place, path):
    task = change(TASK, path, GRAB)
    task = change(task, "num_fewshot", 1)
    task = change(task, "fewshot_config", {"sampler": "first_n", "samples": ROWS})
    solutions = solution_likelihood.tokenize_solutions(
        [write_task(place, task)], tokenizer, items=2, length=128
    )
    assert "is unsafe" in solutions.failed["mine"]
    assert not (place / "OWNED").exists()


def test_patterns_of_filters_and_metrics_end(model, tokenizer, place):
    """The pattern of a filter meets the model's answer, that of a metric the target as well."""
    rows = [{"question": "1", "answer": "a" * 60 + "!"}] * 2
    task = change(TASK, "metric_list.0.regexes_to_ignore", ["(a|aa)+$"])
    with pytest.raises(UnsuitedError, match="regexes_to_ignore: expected at most 1 s of processor"):
        run(model, tokenizer, write_task(place, task, rows))
    task = change(TASK, "filter_list.0.filter.0.regex_pattern", "[")
    with pytest.raises(UnsuitedError, match="mine: filter_list: answer: .*unterminated character"):
        run(model, tokenizer, write_task(place, task))
    (loaded,) = tasks.load_tasks([write_task(place, TASK)])
    task = change(TASK, "filter_list.0.filter.0.regex_pattern", "(a|aa)+$")
    (loaded,) = tasks.load_tasks([write_task(place, task)])
    with tasks.open_task_data([loaded]) as data, TemplateWorker() as worker:
        made = make_lm_eval_task(loaded, data["mine"], worker)
        made.build_all_requests()
        for request in made.instances:
            request.resps = ["a" * 60 + "!"]
        with pytest.raises(UnsuitedError, match="filter_list: answer: expected at most 1 s"):
            made.apply_filters()


def test_hostile_task_stops_no_other(place):
    write_task(place, change(TASK, "doc_to_text", GRAB))
    other = write_task(place, change(TASK, "task", "other"))
    loaded_tasks = tasks.load_tasks([str(place / "mine.yaml"), other])
    with lm_eval_tasks.open_lm_eval_tasks(loaded_tasks) as loaded:
        assert [task.name for task in loaded.tasks] == ["other"]
        assert "is unsafe" in loaded.failed["mine"]


REFUSED: dict[str, tuple[str, object, str]] = {
    "include": ("include", "other.yaml", "copy the keys of that file"),
    "process_docs": ("process_docs", "utils.f", "quantkit.python"),
    "process_results": ("process_results", "utils.f", "use filter_list with exact_match"),
    "custom_dataset": ("custom_dataset", "utils.f", "quantkit.local or quantkit.hub"),
    "dataset script": ("dataset_kwargs", {"trust_remote_code": True}, "quantkit.local"),
    "dataset name": ("dataset_name", "main", "use quantkit.hub.name"),
    "unsafe_code": ("unsafe_code", True, "programs run in a sandbox"),
    "class": ("class", "utils.Task", "write the task with templates"),
    "group": ("group", "g", "list the tasks"),
    "use_prompt": ("use_prompt", "promptsource:*", "copy the prompt"),
    "choices": ("doc_to_choice", "{{choices}}", "doc_to_target"),
    "unknown": ("doc_to_txt", "x", "unknown key. Did you mean 'doc_to_text'?"),
    "metric of a script": ("metric_list.0.metric", "./metric.py", "expected exact_match or bypass"),
    "metric of the hub": ("metric_list.0.hf_evaluate", True, "metrics that download code"),
    "aggregation": ("metric_list.0.aggregation", "x.y", "expected mean, median or bypass"),
    "filter": ("filter_list.0.filter.0.function", "custom", "expected regex, take_first"),
    "filter setting": ("filter_list.0.filter.1.k", 2, "take_first has no setting k"),
    "missing setting": ("filter_list.0.filter.1.function", "take_first_k", "needs the setting k"),
    "more answers than there are": (
        "filter_list.0.filter.1",
        {"function": "take_first_k", "k": 2},
        "expected at most repeats, 1, found 2",
    ),
    "sampler": ("fewshot_config", {"sampler": "x.Sampler"}, "expected default or first_n"),
    "function as samples": ("fewshot_config", {"samples": "utils.f"}, "expected"),
    "generation": ("generation_kwargs.logits_processor", "x", "unknown key"),
    "examples": ("num_fewshot", 10**9, "expected at most 1000"),
    "hub folder": ("quantkit.hub", {"path": "./here"}, "expected OWNER/NAME of a dataset"),
    "hub builder": ("quantkit.hub", {"path": "json"}, "expected OWNER/NAME of a dataset"),
    "hub url": ("quantkit.hub", {"path": "http://x/y"}, "expected OWNER/NAME of a dataset"),
    "hub script": ("quantkit.hub", {"path": "a/b", "trust_remote_code": True}, "unknown key"),
    "absolute path": ("quantkit.local.test", "/etc/passwd", "a path below the folder of the data"),
    "path outside": ("quantkit.local.test", "../../x.jsonl", "a path below the folder of the data"),
    "python outside": ("quantkit.python", "../x.py", "a path below the folder of the data"),
    "template that is a list": ("doc_to_text", ["x"], "expected text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_key_that_could_run_code_is_refused_with_advice(place, name):
    path, value, words = REFUSED[name]
    with pytest.raises(EvaluationError) as caught:
        tasks.load_tasks([write_task(place, change(TASK, path, value))])
    assert words in str(caught.value), str(caught.value)
    assert str(caught.value).startswith(str(place / "mine.yaml"))


def test_local_folder_with_the_name_of_a_dataset_is_refused(place):
    (place / "a" / "b").mkdir(parents=True)
    task = change(TASK, "quantkit.hub", {"path": "a/b"})
    with pytest.raises(EvaluationError, match="name a file on this machine as a local"):
        tasks.load_tasks([write_task(place, task)])


def test_function_tag_is_refused(place):
    path = place / "mine.yaml"
    path.write_text(json.dumps(TASK)[:-1] + ', "process_docs": !function utils.f}')
    (place / "utils.py").write_text("open('OWNED', 'w')\n")
    with pytest.raises(EvaluationError, match="tags"):
        tasks.load_tasks([str(path)])
    assert not (place / "OWNED").exists()


def test_archive_as_data_is_refused(place):
    name = write_task(place, TASK)
    shutil.make_archive(str(place / "bomb"), "zip", place / "data")
    (place / "bomb.zip").rename(place / "data" / "mine.jsonl")
    with pytest.raises(EvaluationError, match="expected one JSON object per line"):
        tasks.load_tasks([name])


# ----------------------------------------------------------------------- own Python of a task

PYTHON = """
SEEN = []
def process_docs(dataset):
    return dataset.select(range(2))
def doc_to_text(doc):
    return "Q: " + doc["question"]
def process_results(doc, results):
    return {"length": len(results[0])}
"""


@pytest.fixture
def own_python(place) -> tuple[str, str]:
    """Write a task with Python of its own; return its path and the sha256 of the Python."""
    (place / "helpers.py").write_text(PYTHON)
    task = {key: value for key, value in TASK.items() if key not in ("doc_to_text", "metric_list")}
    name = write_task(place, change(task, "quantkit.python", "helpers.py"))
    return name, hashlib.sha256(PYTHON.encode()).hexdigest()


def test_own_python_runs_only_with_its_hash(model, tokenizer, own_python):
    name, sha256 = own_python
    for trusted in ((), ("0" * 64,)):
        with pytest.raises(EvaluationError, match=f"add --trust-task-code {sha256}"):
            tasks.load_tasks([name], trusted=trusted)
    loaded = tasks.load_tasks([name], trusted=[sha256])
    items = task_runner.run_tasks(model, tokenizer, loaded, jail=NO_SANDBOX)
    assert [item.prompt for item in items] == ["Q: 1 + 1 = ?", "Q: 2 + 2 = ?"]
    assert all(item.score is not None and item.score >= 0 for item in items)


def test_changed_python_is_not_trusted(place, own_python):
    """Also a change after the check has no effect: the text that was hashed runs."""
    name, sha256 = own_python
    (loaded,) = tasks.load_tasks([name], trusted=[sha256])
    (place / "helpers.py").write_text(PYTHON + "open('OWNED', 'w')\n")
    with pytest.raises(EvaluationError, match="add --trust-task-code"):
        tasks.load_tasks([name], trusted=[sha256])
    with tasks.open_task_data([loaded]) as data, TemplateWorker() as worker:
        make_lm_eval_task(loaded, data["mine"], worker)
    assert not (place / "OWNED").exists()


def test_build_stops_before_it_starts_if_a_task_is_not_trusted(place, own_python):
    """A missing or faulty task is a row of the report instead, as ever."""
    name, sha256 = own_python
    faulty = write_task(place, change(TASK, "task", "faulty") | {"x": 1})
    recipe = parse_recipe(
        "version: 1\nsource: {model: 'builtin:tiny-v3'}\nquantize: {method: rtn, bits: 8}\n"
        "format: dense\nfidelity: none\noutput: {path: x}\n"
        f"evaluation: {{tasks: ['{faulty}', '{name}']}}\n",
        "recipe.yaml",
    )
    with pytest.raises(UntrustedCode, match=f"add --trust-task-code {sha256}"):
        pipeline.tokenize(recipe, package_data.locate_model("builtin:tiny-v3"))
    tasks.check_trust([faulty, name, "absent.yaml", "gsm8k"], [sha256])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = 1", "expected a function process_docs"),
    ],
)
def test_broken_python_is_one_sentence(model, tokenizer, place, own_python, text, sentence):
    (place / "helpers.py").write_text(text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    loaded = tasks.load_tasks([own_python[0]], trusted=[sha256])
    with pytest.raises(EvaluationError, match=sentence):
        task_runner.run_tasks(model, tokenizer, loaded, jail=NO_SANDBOX)


# ------------------------------------------------------------------------------------ equal results

ANSWERS = ["#### 7", "so it is 3. #### 1,000.\n", "nothing", "", "$5 or 12"]


@pytest.mark.parametrize("name", task_files.list_task_names())
def test_shipped_task_equals_lm_evals_own_object(name):
    """Prompts, targets, filtered answers and scores are those of lm-eval with its own rendering."""
    data_folder = Path(os.environ.get(DATA_VARIABLE, ROOT.parent / "shared" / "data"))
    (task,) = tasks.load_tasks([name], data_folder)
    if not task.is_local:
        pytest.skip(f"{name} is not on this machine")
    with tasks.open_task_data([task]) as data, TemplateWorker() as worker:
        plain = ConfigurableTask(config=tasks.get_lm_eval_keys(task) | data[name])
        mine = make_lm_eval_task(task, data[name], worker)
        for made in (plain, mine):
            made.set_fewshot_seed(seed=1234)
            made.build_all_requests(limit=40)
            for number, request in enumerate(made.instances):
                request.resps = [ANSWERS[number % len(ANSWERS)]]
            made.apply_filters()
        for ours, theirs in zip(mine.instances, plain.instances, strict=True):
            assert (ours.args, ours.doc, ours.doc_id) == (theirs.args, theirs.doc, theirs.doc_id)
            assert mine.doc_to_target(ours.doc) == plain.doc_to_target(theirs.doc)
            assert ours.filtered_resps == theirs.filtered_resps
            for text in ours.filtered_resps.values():
                scores = [made.process_results(ours.doc, [text]) for made in (mine, plain)]
                assert scores[0] == scores[1]


def test_readme_example_is_a_valid_task(tmp_path):
    text = (ROOT / "evals" / "README.md").read_text(encoding="utf-8")
    example = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "sums.yaml").write_text(example)
    (tmp_path / "data").mkdir()
    row = text.split("```json\n")[1].split("```")[0]
    (tmp_path / "data" / "sums.jsonl").write_text(row)
    (task,) = tasks.load_tasks([str(tmp_path / "sums.yaml")])
    assert task.gold == "{{solution}}"
    assert YAML(typ="safe", pure=True).load(example)["task"] == "sums"
