"""Answers of a conversation are scored by their content, not by their form."""

from __future__ import annotations

import ast
import json
import os
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.paths import ROOT

from quantkit.evaluate import task_runner, tasks
from quantkit.evaluate.chat_answers import (
    extract_code,
    is_python,
    make_completion,
    read_number_answer,
    restore_indent,
)
from quantkit.evaluate.sandbox import Sandbox, run_programs
from quantkit.io.templates import TemplateWorker

HEAD = 'def add(a, b):\n    """Add."""\n'
BODY = "    c = a + b\n    return c\n"
WHOLE = f"{HEAD}{BODY}"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("#### $1,000.00", "#### 1000"),
        ("The answer is **$1,000.00**.", "The answer is 1000."),
        (r"so \boxed{1,234,567}", "so 1234567"),
        ("#### 12", "#### 12"),
        ("1.50 and 3.25", "1.50 and 3.25"),
        ("-$20 or €20.00", "-20 or 20"),
        ("versions 1.2.3 and 10,20", "versions 1.2.3 and 10,20"),
        ("#### 7.0", "#### 7"),
        ("#### $-10.00 and 10-$20", "#### -10 and 10-20"),
        (r"$\boxed{\$1{,}234}$ and 56\,789.50", "1234$ and 56789.50"),
    ],
)
def test_numbers_are_read_as_a_program_writes_them(answer: str, expected: str) -> None:
    assert read_number_answer(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"Here it is:\n```python\n{WHOLE}```\nIt adds.", WHOLE),
        (f"```\nadd(1, 2)\n```\nwith\n```py\n{WHOLE}```", WHOLE),
        (f"```bash\npip install x\n```\n~~~python\n{WHOLE}~~~", WHOLE),
        (f"```python\n{WHOLE}", WHOLE),
        (WHOLE, WHOLE),
    ],
)
def test_code_is_taken_from_the_fence(answer: str, expected: str) -> None:
    assert extract_code(answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        BODY,
        BODY.strip(),  # the first indent is lost
        "c = a + b\nreturn c",  # every indent is lost
        f"Sure!\n```python\n{WHOLE}```\nDone.",
        f"```python\n{BODY}```",
        f"```python\nimport math\n\n{WHOLE}\nprint(add(1, 2))\n```",
    ],
)
def test_every_form_of_an_answer_completes_the_function(answer: str) -> None:
    names: dict[str, Any] = {}
    exec(HEAD + make_completion(answer, HEAD), names)
    assert names["add"](2, 3) == 5


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (["for x in y:", "        if x:", "            return x", "    return 0"], 0),
        (["for x in y:", "        return x"], None),  # nothing after the loop
        (["for x in y:", "    return x"], 1),
        (["if y: return 1", "    return 2"], 0),
        (["    return 0"], 0),
    ],
)
def test_body_continues_the_function(body: list[str], expected: int | None) -> None:
    """expected: how many of the lines after the first are moved, too; None: any."""
    names: dict[str, Any] = {}
    made = restore_indent(body, HEAD).split("\n")
    assert made[0] == "    " + body[0].lstrip()
    exec(HEAD + "\n".join(made), names)
    if expected is not None and len(body) > 1:
        assert (made[1] != body[1]) is bool(expected)


def test_indentation_is_that_of_the_docstring() -> None:
    head = 'def f(x):\n  """Two."""\n'
    assert restore_indent(["y = x", "return y"], head) == "  y = x\n  return y"


@pytest.mark.parametrize(
    "answer",
    [
        f"[BEGIN]\n{WHOLE}[DONE]",
        f"[PYTHON]\n{WHOLE}[/PYTHON]\n",
        f"```python\n[BEGIN]\n{WHOLE}[DONE]\n```",
        f"[BEGIN]\n```python\n{WHOLE}```\n[DONE]",
    ],
)
def test_marks_of_the_examples_are_removed(answer: str) -> None:
    names: dict[str, Any] = {}
    exec(make_completion(answer, ""), names)
    assert names["add"](2, 3) == 5


# ---------------------------------------------------------------------- the published solutions

DATA = Path(os.environ.get("QUANTKIT_DATA", ROOT.parent / "shared" / "data"))


def read_rows(file: str) -> list[dict[str, Any]]:
    """Read a data set that is not part of the project, or skip the test."""
    if not (DATA / file).is_file():
        pytest.skip(f"{file} is not on this machine")
    return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


def list_chat_forms(doc: dict[str, Any]) -> dict[str, str]:
    """Return forms in which a chat model gives the solution of an item of HumanEval."""
    body, prompt = doc["canonical_solution"], doc["prompt"]
    own = prompt[prompt.rindex(f"def {doc['entry_point']}") :] + body
    return {
        "body, stripped": body.strip(),
        "body without indentation": textwrap.dedent(body).strip(),
        "body in a fence": f"Here it is:\n\n```python\n{body}```\nDone.",
        "stripped body in a fence": f"```python\n{body.strip()}\n```",
        "function in a fence": f"```\n{own}\n```",
        "everything in a fence in a list": "1. Code:\n\n"
        + textwrap.indent(f"```python\n{prompt}{body}\n```\n", "   "),
    }


def test_solutions_of_humaneval_pass_in_every_chat_form(jail: Sandbox) -> None:
    (task,) = tasks.load_tasks(["humaneval"], DATA)
    docs = read_rows("humaneval/HumanEval.jsonl")
    assert task.code is not None and len(docs) == 164
    unread, programs = [], []
    with TemplateWorker() as worker:
        for doc in docs:
            for form, answer in list_chat_forms(doc).items():
                made = task_runner.build_program(worker, "t", task.code, doc, answer, "code")
                if form == "body in a fence":
                    programs.append(made)
                if not is_python(made.source) or not defines(made.source, doc["entry_point"]):
                    unread.append((doc["task_id"], form))
    assert unread == []
    results = run_programs(programs, jail, task.code.seconds)
    failed = [doc["task_id"] for doc, x in zip(docs, results, strict=True) if not x.passed]
    assert failed == []


def defines(source: str, name: str) -> bool:
    """Return whether a program is imports and functions, the last with this name, and returns
    nothing at its top level.
    """
    parsed = ast.parse(source)
    compile(parsed, "program", "exec")  # refuses `return` outside of a function
    last = [node for node in parsed.body if isinstance(node, ast.FunctionDef)][-1]
    return last.name == name


def test_solutions_of_mbpp_are_read_in_every_chat_form() -> None:
    for row in read_rows("mbpp/mbpp.jsonl")[10:510]:
        code = row["code"].replace("\r\n", "\n").strip()
        for answer in (
            f"Here it is:\n```python\n{code}\n```\nIt works.",
            f"[BEGIN]\n{code}\n[DONE]",
            f"```python\n{code}\n```\nFor example:\n```python\nprint(1)\n```",
        ):
            assert make_completion(answer, "").strip() == code


def test_answers_of_gsm8k_are_read_in_every_chat_form() -> None:
    (task,) = tasks.load_tasks(["gsm8k"], DATA)
    strict, flexible = (
        re.compile(filters["filter"][0]["regex_pattern"]) for filters in task.config["filter_list"]
    )
    for row in read_rows("gsm8k/test.jsonl"):
        answer = row["answer"].partition("#### ")[2].strip().replace(",", "")
        shown = f"{int(answer):,}"
        latex = shown.replace(",", "{,}")
        for text in (
            f"#### {shown}",
            f"#### ${shown}.00",
            f"**#### ${shown} dollars**",
            rf"#### $\boxed{{\${latex}}}$",
        ):
            assert strict.findall(read_number_answer(text)) == [answer]
        for text in (f"She has **${shown}** left.", rf"\[\boxed{{{latex}}}\]", f"It is {shown}%."):
            found = flexible.findall(read_number_answer(text))[-1]
            assert "".join(found).rstrip(".") == answer


def test_program_of_its_own_is_not_continued() -> None:
    assert make_completion(f"```python\n{WHOLE}```", "") == WHOLE
    assert make_completion("x = 1", "") == "x = 1"


def write_task(folder: Path, block: str) -> Path:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data/t.jsonl").write_text(json.dumps({"prompt": HEAD, "test": "assert 1"}))
    path = folder / "t.yaml"
    path.write_text(
        f"quantkit: {{domain: code, local: {{test: t.jsonl}}, {block}}}\n"
        "task: t\noutput_type: generate_until\ntest_split: test\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_target: "x"\n'
        'generation_kwargs: {until: ["\\ndef"]}\n'
    )
    return path


CODE = "code: {source: '{{prompt}}{{completion}}', tests: '{{test}}'}"


@pytest.mark.parametrize(
    ("block", "plain", "chat"),
    [
        (CODE, "plain", "chat, code from the fence; not validated in this form"),
        (f"{CODE}, validated: [plain, chat]", "plain", "chat, code from the fence"),
        ("chat: number", "plain", "chat, numbers without currency, separators and trailing zeros; "
         "not validated in this form"),
        ("validated: [chat]", "plain", "chat, answers as they are"),
    ],
)  # fmt: skip
def test_results_name_the_variant(block: str, plain: str, chat: str, tmp_path: Path) -> None:
    (task,) = tasks.load_tasks([str(write_task(tmp_path, block))])
    assert task_runner.describe_variant(task, chat=False) == plain
    assert task_runner.describe_variant(task, chat=True) == chat


def test_program_of_a_chat_answer_runs(tmp_path: Path) -> None:
    (task,) = tasks.load_tasks([str(write_task(tmp_path, CODE))])
    assert task.code is not None
    with TemplateWorker() as worker:
        made = [
            task_runner.build_program(
                worker, "t", task.code, {"prompt": HEAD, "test": ""}, f"```\n{WHOLE}```", form
            )
            for form in ("code", None)
        ]
    names: dict[str, Any] = {}
    exec(made[0].source, names)
    assert names["add"](1, 1) == 2
    with pytest.raises(SyntaxError):
        compile(made[1].source, "plain", "exec")


def test_stop_strings_of_code_do_not_end_a_fence() -> None:
    config = SimpleNamespace(generation_kwargs={"until": ["\ndef", "[DONE]"], "max_gen_toks": 5})
    changed: dict[str, object] = {}
    task = SimpleNamespace(config=config, set_config=changed.__setitem__)
    kept = {"until": ["[DONE]"], "max_gen_toks": 5}
    for form, expected in (("code", kept), ("text", None)):
        changed.clear()
        loaded = SimpleNamespace(
            tasks=[SimpleNamespace(name="t", chat=form)], lm_eval_tasks={"t": task}
        )
        task_runner.set_chat_stops(loaded)  # type: ignore[arg-type]
        assert changed.get("generation_kwargs") == expected
