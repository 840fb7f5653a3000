"""Answers of a conversation are scored by their content, not by their form."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit.evaluate import task_runner, tasks
from quantkit.evaluate.chat_answers import (
    extract_code,
    make_completion,
    read_number_answer,
    restore_indent,
)
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


def test_nested_indents_survive_a_lost_first_one() -> None:
    body = ["for x in y:", "        if x:", "            return x", "    return 0"]
    assert restore_indent(body).split("\n")[0] == "    for x in y:"


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
    config = SimpleNamespace(generation_kwargs={"until": ["\ndef"], "max_gen_toks": 5})
    changed: dict[str, object] = {}
    task = SimpleNamespace(config=config, set_config=changed.__setitem__)
    for form, expected in (("code", {"until": [], "max_gen_toks": 5}), ("text", None)):
        changed.clear()
        loaded = SimpleNamespace(
            tasks=[SimpleNamespace(name="t", chat=form)], lm_eval_tasks={"t": task}
        )
        task_runner.set_chat_stops(loaded)  # type: ignore[arg-type]
        assert changed.get("generation_kwargs") == expected
